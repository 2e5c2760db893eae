"""Which processes of this process's sandboxes still run, whatever other tests run beside it."""

from __future__ import annotations

import os
import time
from pathlib import Path

from megatron_r1.rewards.sandbox.command import SLOTS, real_users, user_of


def survivors(neighbours_end_s: float) -> list[str]:
    """Processes that outlived a sandbox of this process.

    As root each process's sandboxes have users of their own, and one look is enough. Else a program of another
    process's sandbox looks the same, but ends by its limits: what survives is there after `neighbours_end_s` too.
    """
    if real_users():
        return sorted(_of_own_users().values())
    found, end = _in_other_namespaces(), time.monotonic() + neighbours_end_s
    while found and time.monotonic() < end:
        time.sleep(0.1)
        found = {name: line for name, line in _in_other_namespaces().items() if name in found}
    return sorted(found.values())


def _of_own_users() -> dict[str, str]:
    users = range(int(user_of(0)), int(user_of(SLOTS - 1)) + 1)
    return _processes(lambda folder: folder.stat().st_uid in users)


def _in_other_namespaces() -> dict[str, str]:
    """Processes of this user that are in another process namespace."""
    own = os.readlink("/proc/self/ns/pid")
    return _processes(lambda folder: folder.stat().st_uid == os.geteuid() and os.readlink(folder / "ns/pid") != own)


def _processes(belongs) -> dict[str, str]:
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if belongs(folder):
                found[folder.name] = f"{folder.name}: {(folder / 'cmdline').read_text(errors='replace')[:200]}"
        except OSError:
            continue
    return found
