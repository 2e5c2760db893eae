"""Ranks that are forked: what they are given, and that none outlives its test."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path

import psutil
import pytest

from tests.support.fork_server import run_forked

PROGRAM = """
import json, os, subprocess, sys, time
from pathlib import Path

folder, kind, rank = Path(sys.argv[1]), sys.argv[2], os.environ["RANK"]
child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(300)"])
written = folder / f"{rank}.written"
written.write_text(json.dumps({"pids": [os.getpid(), child.pid], "torch": "torch" in sys.modules, **os.environ}))
written.rename(folder / f"{rank}.json")
while not (folder / "0.json").exists():
    time.sleep(0.01)
if kind == "raising" and rank == "1":
    raise ValueError("the fault of this test")
if kind == "raising":
    time.sleep(300)
"""


@pytest.mark.dist
@pytest.mark.parametrize("kind", ["ending", "raising"])
def test_ranks_know_each_other_and_none_outlives_its_test(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    monkeypatch.setenv("OF_TEST", kind)
    done = run_forked(tmp_path / "program.py", tmp_path, kind, ranks=2, seconds=60)
    assert done.returncode == (kind == "raising") and ("ValueError: the fault" in done.stderr) == (kind == "raising")
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert [(one["RANK"], one["LOCAL_RANK"], one["WORLD_SIZE"]) for one in found] == [("0", "0", "2"), ("1", "1", "2")]
    assert found[0]["MASTER_PORT"] == found[1]["MASTER_PORT"]
    assert all(one["torch"] and one["OF_TEST"] == kind for one in found)
    deadline = time.monotonic() + 10
    while left := [pid for one in found for pid in one["pids"] if lives(pid)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.01)


def lives(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False
