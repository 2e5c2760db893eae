"""Resources that a program and its child processes use, measured from outside."""

from __future__ import annotations

import contextlib
import os

PAGE = os.sysconf("SC_PAGE_SIZE")


def held(pid: int, most: int) -> tuple[int, int]:
    """Bytes in memory and threads of a process and its descendants; a page that two share counts twice.

    Stops counting beyond `most` threads.
    """
    total, threads, todo = 0, 0, [pid]
    while todo and threads <= most:
        folder = f"/proc/{todo.pop()}"
        with contextlib.suppress(OSError):  # it may have ended since
            with open(f"{folder}/statm", encoding="ascii") as file:
                total += int(file.read().split()[1]) * PAGE
            for thread in os.listdir(f"{folder}/task"):
                threads += 1
                with open(f"{folder}/task/{thread}/children", encoding="ascii") as file:
                    todo += map(int, file.read().split())
    return total, threads


def files_made(folder: str, size: int) -> int:
    """Files and folders in the file system at `folder`; 0 where it cannot be read, or is not one of `size` bytes.

    (Before the sandbox is complete, its first process still sees the machine's own file system there.)
    """
    with contextlib.suppress(OSError):
        found = os.statvfs(folder)
        if found.f_blocks * found.f_frsize == size:
            return found.f_files - found.f_ffree
    return 0
