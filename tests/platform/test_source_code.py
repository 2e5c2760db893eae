"""The state of the source code against git's own commands, in repositories made here."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from megatron_r1.platform import source_code as module
from megatron_r1.platform.source_code import source_code
from tests.support.repositories import git, repository


@pytest.fixture
def code(tmp_path: Path) -> Path:
    return repository(tmp_path / "code", {"a.py": "a = 1\n", "b.bin": "\x00\x01", ".env": "X=1\n", "gone.py": "g\n"})


def test_a_clean_tree_is_its_commit(code):
    found = source_code(code)
    assert (found.commit, found.branch, found.dirty) == (git(code, "rev-parse", "HEAD"), "work", False)
    assert found.unknown == "" and found.diff == b"" and found.changed == found.untracked == ()
    git(code, "checkout", "--detach", "--quiet")
    assert source_code(code).branch is None


def test_the_recorded_diff_makes_the_tree_again(code, tmp_path):
    git(tmp_path, "clone", "--quiet", str(code), "again")
    (code / "a.py").write_text("a = 2  # \u00e4\n")
    (code / "b.bin").write_bytes(bytes(range(256)))
    (code / "gone.py").unlink()
    (code / ".env").write_text("X=secret\n")
    (code / "new.py").touch()
    found = source_code(code)
    assert found.dirty and found.changed == (".env", "a.py", "b.bin", "gone.py") and found.untracked == ("new.py",)
    assert b"secret" not in found.diff and len(found.diff) == found.diff_bytes
    subprocess.run(["git", "apply", "-"], cwd=tmp_path / "again", input=found.diff, check=True)
    for name in ("a.py", "b.bin"):
        assert (tmp_path / "again" / name).read_bytes() == (code / name).read_bytes()
    assert not (tmp_path / "again" / "gone.py").exists()


def test_untracked_files_alone_make_a_tree_dirty_and_are_counted(code, monkeypatch):
    monkeypatch.setattr(module, "UNTRACKED", 2)
    for name in "xyz":
        (code / name).touch()
    found = source_code(code)
    assert found.dirty and found.untracked == ("x", "y") and found.untracked_files == 3 and found.diff == b""


def test_a_long_diff_is_cut(code, monkeypatch):
    monkeypatch.setattr(module, "DIFF_BYTES", 50)
    (code / "a.py").write_text("a = 3\n" * 100)
    found = source_code(code)
    assert len(found.diff) == 50 < found.diff_bytes


def test_without_git_or_repository_it_says_so(code, tmp_path, monkeypatch):
    (tmp_path / "plain").mkdir()
    assert "not a git repository" in source_code(tmp_path / "plain").unknown
    (code / "inside").mkdir()
    assert "no repository of its own" in source_code(code / "inside").unknown
    git(tmp_path, "init", "--quiet", "empty")
    assert "rev-parse" in source_code(tmp_path / "empty").unknown
    monkeypatch.setenv("PATH", str(tmp_path))
    assert source_code(code).unknown == "no git here"


def test_a_git_that_hangs_is_left_after_a_time(code, tmp_path, monkeypatch):
    real = next(path for path in os.environ["PATH"].split(":") if Path(path, "git").exists())
    slow = tmp_path / "bin" / "git"
    slow.parent.mkdir()
    slow.write_text(f'#!/bin/sh\ncase "$*" in *status*) exec sleep 60 ;; esac\nexec {real}/git "$@"\n')
    slow.chmod(0o755)
    monkeypatch.setenv("PATH", f"{slow.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(module, "TIMEOUT_S", 2.0)
    found = source_code(code)
    assert found.unknown == "git status took more than 2 s"
    assert found.commit == git(code, "rev-parse", "HEAD") and found.dirty is None
