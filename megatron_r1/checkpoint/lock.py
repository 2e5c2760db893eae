"""The lock by which a folder belongs to one job."""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path
from typing import IO

from megatron_r1.errors import ExitCode, UserError


class FolderInUse(UserError):
    """Another process writes to this folder."""

    exit_code = ExitCode.BAD_CONFIG


def take_lock(path: Path, otherwise: str = "two jobs cannot write to one run") -> IO[str]:
    """Hold `path` until the returned file is closed or this process ends, however it ends.

    Args:
        otherwise: why it must not be held twice.

    Raises:
        FolderInUse: another process holds it; says on which host and under which process id.
    """
    file = path.open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        owner = file.read().strip() or "another process"
        file.close()
        raise FolderInUse(f"{path.parent} is in use by {owner}: {otherwise}") from error
    file.truncate(0)
    file.write(f"host {socket.gethostname()} pid {os.getpid()}\n")
    file.flush()
    return file
