"""What SGLang's servers leave on a machine when they are killed: temporary folders, and segments of shared memory.

A server's folder is locked while it or the program that started it lives, and SGLang names its segments after the
folder. So a later start can tell what servers of this program left that are dead, and removes nothing else.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path

from megatron_r1.errors import FolderInUse
from megatron_r1.files import Lock, take_lock
from megatron_r1.platform import shared_memory
from megatron_r1.platform.temporary import folder_for_sockets

PREFIX = "megatron_r1-server-"
MAPPED = re.compile(r"/dev/shm/(?:sglang_|sgl_shm_)\S+")


def new_folder() -> tuple[Path, Lock]:
    """A new folder for a server's temporary files, and the lock that says that somebody needs it."""
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=folder_for_sockets()))
    return folder, take_lock(folder)


def mapped_segments(group: int) -> set[Path]:
    """Segments that SGLang made for the processes of a group, as long as they run."""
    found: set[Path] = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.getpgid(int(process.name)) == group:
                found |= set(map(Path, MAPPED.findall((process / "maps").read_text())))
        except OSError:
            continue  # it has ended meanwhile
    return found


def named_segments(folder: Path) -> set[Path]:
    """Segments with the name of a server's folder, whether its processes run or not."""
    return set(shared_memory.MEMORY.glob(f"sglang_*{folder.name}_*"))


def remove(folder: Path, mapped: set[Path]) -> None:
    """Remove a server's folder and its segments."""
    for segment in mapped | named_segments(folder):
        segment.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def remove_of_dead_servers() -> int:
    """Remove what this program's servers on this machine left that were killed together with it; returns how many."""
    removed = 0
    for folder in folder_for_sockets().glob(f"{PREFIX}*"):
        try:
            if not any(folder.iterdir()):  # of a server that starts at this moment: it is not locked yet
                continue
            with take_lock(folder):
                remove(folder, set())
        except (FolderInUse, OSError):  # needed, or another user's
            continue
        removed += 1
    return removed
