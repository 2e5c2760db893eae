"""Files that a kill leaves old, new or absent but never half written; locks; hashes of what was written."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from megatron_r1.errors import FolderInUse


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a file beside `path` to write; it takes that name, durably, when the block ends well, else it is removed.

    Readers, and a process that is killed in between, see the old file or the whole new one.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield part
        sync(part)
        part.replace(path)
        sync(path.parent)
    finally:
        part.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that appears complete or not at all, durably."""
    with replacing(path) as part:
        part.write_bytes(content)


class Lock:
    """An exclusive lock that is held until `close`, or until this process ends, however it ends."""

    def __init__(self, descriptor: int):
        self._descriptor: int | None = descriptor

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of it; calling it again changes nothing."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def take_lock(path: Path, otherwise: str = "two jobs cannot write to one run", *, wait: bool = False) -> Lock:
    """Lock a file, which is made where it is missing and says who holds it, or a folder, into which nothing is written.

    Args:
        otherwise: why it must not be held twice.
        wait: until another process lets go of it, instead of refusing.

    Raises:
        FolderInUse: another process holds it; says on which host and under which process id.
    """
    is_folder = path.is_dir()
    descriptor = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        owner = "" if is_folder else os.pread(descriptor, 1000, 0).decode(errors="replace").strip()
        os.close(descriptor)
        folder = path if is_folder else path.parent
        raise FolderInUse(f"{folder} is in use by {owner or 'another process'}: {otherwise}") from error
    if not is_folder:
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, f"host {socket.gethostname()} pid {os.getpid()}\n".encode(), 0)
    return Lock(descriptor)


def sync(path: Path) -> None:
    """Make what was written to a file, or renamed in a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def canonical_json(value: Any) -> bytes:
    """The one JSON text of a value."""
    return json.dumps(value, sort_keys=True, indent=1, allow_nan=False).encode("ascii")


def digest_of(path: Path) -> str:
    """SHA-256 of a file in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
