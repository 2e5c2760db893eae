"""What killed servers leave: a later start removes it once nobody needs it, and nothing of others."""

import subprocess
import tempfile
from pathlib import Path

import pytest

from megatron_r1.platform import shared_memory
from megatron_r1.rollout.sglang.servers import leftovers
from megatron_r1.rollout.sglang.servers.leftovers import PREFIX, remove_of_dead_servers


@pytest.fixture
def machine(tmp_path, monkeypatch) -> Path:
    """Folders for temporary files and for shared memory, with what other programs have there."""
    for name in ("tmp", "shm"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(leftovers, "folder_for_sockets", lambda: tmp_path / "tmp")
    monkeypatch.setattr(shared_memory, "MEMORY", tmp_path / "shm")
    others = (tmp_path / "tmp" / "sglang-weights" / "model", tmp_path / "shm" / "sglang_loads_3f0a_12.shm")
    for path in others:
        path.parent.mkdir(exist_ok=True)
        path.write_text("of another program")
    return tmp_path


def test_leftovers_go_when_server_and_program_are_dead(machine):
    folder, lock = leftovers.new_folder()
    segment = machine / "shm" / f"sglang_loads_{folder.name}_12ab.shm"
    for path in (segment, folder / "socket"):
        path.touch()
    with subprocess.Popen(["sleep", "60"], pass_fds=[lock.descriptor]) as server:
        assert remove_of_dead_servers() == 0, "both live"
        lock.close()
        assert remove_of_dead_servers() == 0 and segment.exists(), "the server lives"
        server.kill()
    assert remove_of_dead_servers() == 1 and remove_of_dead_servers() == 0
    assert sorted(path.name for path in machine.rglob("*") if path.is_file()) == ["model", "sglang_loads_3f0a_12.shm"]


def test_a_server_that_starts_at_this_moment_keeps_its_folder(machine):
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=machine / "tmp"))
    assert remove_of_dead_servers() == 0 and folder.is_dir()
