"""Reading text and JSON; atomic writes, which a kill never leaves half done; locks; hashes of files."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Self

from megatron_r1.errors import DataError, FolderInUse


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, without a byte order mark. Raises DataError, which names the file."""
    try:
        return path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise DataError(f"{path}: cannot be read ({reason})") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises DataError, which names the file, where there is none."""
    try:
        content = json.loads(path.read_text("utf-8-sig"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError):
        raise DataError(f"{path}: is no JSON") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: must hold a JSON object")
    return content


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; without an error in the block it is renamed to `path`, else removed.

    The rename is durable. Readers see the old file or the complete new one, also after a kill.
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
    """An exclusive lock, which is held until `close` or until this process ends in any way."""

    def __init__(self, descriptor: int):
        self._descriptor: int | None = descriptor

    @property
    def descriptor(self) -> int:
        """The open file; a child that inherits it holds the lock too.

        Raises:
            ValueError: the lock is released.
        """
        if self._descriptor is None:
            raise ValueError("the lock is released")
        return self._descriptor

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the lock; further calls have no effect."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def take_lock(path: Path, reason: str = "two jobs cannot write to one run", *, wait: bool = False) -> Lock:
    """Lock a folder, or a file, which is created if missing and into which this process writes its host and id.

    Args:
        reason: why two processes must not hold the lock, for the error.
        wait: wait until another process releases the lock, instead of raising.

    Raises:
        FolderInUse: another process holds the lock; names its host and process id.
    """
    is_folder = path.is_dir()
    descriptor = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        owner = "" if is_folder else os.pread(descriptor, 1000, 0).decode(errors="replace").strip()
        os.close(descriptor)
        folder = path if is_folder else path.parent
        raise FolderInUse(f"{folder} is in use by {owner or 'another process'}: {reason}") from error
    if not is_folder:
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, f"host {socket.gethostname()} pid {os.getpid()}\n".encode(), 0)
    return Lock(descriptor)


def hold(path: Path) -> BinaryIO | None:
    """Hold a file against `is_held` until the returned object is closed or collected; several may hold it.

    Waits while the owner looks. None where the file cannot be read or its file system has no locks.
    """
    file = None
    try:
        file = path.open("rb")
        fcntl.flock(file, fcntl.LOCK_SH)
    except OSError:
        if file:
            file.close()
        return None
    return file


def is_held(path: Path) -> bool:
    """Whether anyone holds the file now; False where the file system has no locks."""
    try:
        with path.open("r+b") as file:  # NFS locks exclusively only what is open for writing
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def sync(path: Path) -> None:
    """fsync a file, or a folder after a rename in it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def canonical_json(value: Any) -> bytes:
    """The canonical JSON text of a value: sorted keys, no white space."""
    return json.dumps(value, sort_keys=True, indent=1, allow_nan=False).encode("ascii")


def digest_of(path: Path) -> str:
    """SHA-256 of a file in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
