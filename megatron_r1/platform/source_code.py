"""The state of the source code in git: commit, branch, and what differs from the commit."""

from __future__ import annotations

import os
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

TIMEOUT_S = 10.0
"""Most seconds of one git command: a working tree on a shared disk may take minutes."""
DIFF_BYTES = 1 << 20
UNTRACKED = 100
"""Untracked files that are listed by name."""
LEFT_OUT = (":(exclude,glob)**/.env", ":(exclude,glob)**/.env.*")
"""Files of secrets, whose differences are not read."""
DIFF = ("diff", "HEAD", "--binary", "--no-color", "--no-ext-diff", "--", ".", *LEFT_OUT)


class GitFails(Exception):
    """A git command failed; the message says why."""


@dataclass(frozen=True, slots=True)
class SourceCode:
    """What git says of a folder."""

    unknown: str = ""
    """Why git says nothing of it, or not all; empty where it does."""
    commit: str | None = None
    branch: str | None = None
    """None where no branch is checked out."""
    dirty: bool | None = None
    """Whether files differ from the commit or are not tracked."""
    changed: tuple[str, ...] = ()
    """Tracked files that differ from the commit."""
    untracked: tuple[str, ...] = ()
    """Files that are neither tracked nor ignored, the first `UNTRACKED` of them."""
    untracked_files: int = 0
    diff: bytes = b""
    """Differences of tracked files from the commit, as `git apply` takes them; at most `DIFF_BYTES`."""
    diff_bytes: int = 0
    """Length of all differences."""


def source_code(folder: Path) -> SourceCode:
    """The state of the working tree whose top is `folder`; never an error."""
    commit = branch = None
    try:
        if not folder.samefile(_line(folder, "rev-parse", "--show-toplevel")):
            return SourceCode("the package is in no repository of its own")
        commit = _line(folder, "rev-parse", "HEAD")
        branch = _line(folder, "rev-parse", "--abbrev-ref", "HEAD")
        branch = None if branch == "HEAD" else branch
        entries = _text(folder, "status", "--porcelain", "-z", "--no-renames").split("\0")[:-1]
        untracked = [entry[3:] for entry in entries if entry.startswith("??")]
        changed = [entry[3:] for entry in entries if not entry.startswith("??")]
        diff, diff_bytes = _git(folder, *DIFF, most=DIFF_BYTES)
    except (GitFails, OSError) as error:
        return SourceCode(str(error), commit, branch)
    return SourceCode(
        commit=commit,
        branch=branch,
        dirty=bool(entries),
        changed=tuple(changed),
        untracked=tuple(untracked[:UNTRACKED]),
        untracked_files=len(untracked),
        diff=diff,
        diff_bytes=diff_bytes,
    )


def _line(folder: Path, *arguments: str) -> str:
    return _text(folder, *arguments).strip()


def _text(folder: Path, *arguments: str) -> str:
    return os.fsdecode(_git(folder, *arguments)[0])


def _git(folder: Path, *arguments: str, most: int = -1) -> tuple[bytes, int]:
    """The first `most` bytes that a git command prints, or all, and the length of all. Raises GitFails."""
    with tempfile.TemporaryFile() as printed:
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=subprocess.PIPE,
                timeout=TIMEOUT_S,
                env=os.environ | {"GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"},
            )
        except FileNotFoundError:
            raise GitFails("no git here") from None
        except subprocess.TimeoutExpired:
            raise GitFails(f"git {arguments[0]} took more than {TIMEOUT_S:g} s") from None
        if done.returncode:
            reason = done.stderr.decode(errors="replace").strip().splitlines() or [f"status {done.returncode}"]
            raise GitFails(f"git {arguments[0]}: {reason[0]}")
        length = printed.seek(0, os.SEEK_END)
        printed.seek(0)
        return printed.read(most), length
