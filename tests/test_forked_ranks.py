"""Ranks that are forked: what they are told, and that none outlives its test."""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path

import psutil
import pytest

from tests.support.forked_ranks import run_ranks

PROGRAM = """
import json, os, subprocess, sys, time
from pathlib import Path

folder, kind, rank = Path(sys.argv[1]), sys.argv[2], os.environ["RANK"]
child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(300)"])
known = "torch" in sys.modules
(folder / f"{rank}.json").write_text(
    json.dumps({"processes": [os.getpid(), child.pid], "known": known, "of_test": os.environ["OF_TEST"]})
)
while not (folder / "1.json").exists():
    time.sleep(0.01)
if kind == "raising" and rank == "1":
    raise ValueError("the fault of this test")
if kind != "ending":
    print(f"rank {rank} sleeps", flush=True)
    time.sleep(300)
"""


def run(folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch, seconds: float) -> list[dict]:
    """What two ranks were told, once neither they nor their children live any more."""
    (folder / "program.py").write_text(PROGRAM)
    monkeypatch.setenv("OF_TEST", kind)
    try:
        run_ranks(folder / "program.py", folder, kind, ranks=2, seconds=seconds)
    finally:
        found = [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]
        deadline = time.monotonic() + 10
        while left := [pid for one in found for pid in one["processes"] if lives(pid)]:
            assert time.monotonic() < deadline, left
            time.sleep(0.01)
    return found


def lives(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


@pytest.mark.dist
def test_ranks_have_the_libraries_and_the_environment_of_the_test(tmp_path, monkeypatch):
    for one in run(tmp_path, "ending", monkeypatch, 100):
        assert one["known"] and one["of_test"] == "ending"
        assert os.getpid() not in one["processes"]


@pytest.mark.dist
def test_no_rank_waits_for_one_that_failed(tmp_path, monkeypatch):
    with pytest.raises(AssertionError, match=r"(?s)rank 1 of 2 ended with 1.*ValueError: the fault of this test"):
        run(tmp_path, "raising", monkeypatch, 100)


@pytest.mark.dist
def test_ranks_that_never_end_are_ended(tmp_path, monkeypatch):
    with pytest.raises(AssertionError, match=r"(?s)after 8 s rank 0, 1 of 2 still runs.*rank . sleeps"):
        run(tmp_path, "sleeping", monkeypatch, 8)
