"""Hashes of files, and files that appear whole or not at all."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from megatron_r1.errors import FolderInUse
from megatron_r1.files import digest_of, replacing, take_lock, write_whole


def test_digest_is_sha256(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    assert digest_of(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state"
    write_whole(path, b"old")

    def failing(self: Path, target: Path) -> None:
        raise OSError("disk")

    monkeypatch.setattr(Path, "replace", failing)
    with pytest.raises(OSError, match="disk"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["state"]


def test_a_block_that_fails_leaves_the_old_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "table"
    write_whole(path, b"old")
    with pytest.raises(ZeroDivisionError), replacing(path) as part:
        part.write_bytes(b"half")
        _ = 1 / 0
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["table"]
    with replacing(path) as part:
        part.write_bytes(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["table"]


@pytest.mark.parametrize("name", ["lock", "."])
def test_a_lock_is_held_once_and_says_by_whom(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with take_lock(path, "one at a time"):
        holder = f"pid {os.getpid()}" if name == "lock" else "another process"
        with pytest.raises(FolderInUse, match=f"{tmp_path} is in use by .*{holder}: one at a time"):
            take_lock(path, "one at a time")
    take_lock(path).close()
    assert os.listdir(tmp_path) == (["lock"] if name == "lock" else [])


def test_a_lock_can_be_waited_for(tmp_path: Path) -> None:
    held = take_lock(tmp_path / "lock")
    timer = threading.Timer(0.1, held.close)
    timer.start()
    with take_lock(tmp_path / "lock", wait=True):
        assert not timer.is_alive() or timer.finished.is_set()
    timer.join()
