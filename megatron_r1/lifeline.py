"""Ties a process to its parent: when the parent dies, `kill -9` included, the kernel kills the child at once.

The parent holds both ends of a pipe that nothing is ever written to. The child opens the reading end through /proc and
asks the kernel to send SIGKILL to it when the pipe changes, which it does only when its last writer, the parent, is
gone. This needs no thread and no interpreter lock of the child, so a child that hangs in native code dies too, and
unlike PR_SET_PDEATHSIG it does not mind which thread of the parent started the child.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import select
import signal
import threading

VARIABLE = "MEGATRON_R1_LIFELINE"
"""Environment variable by which a parent tells a child the address of its lifeline: process id and descriptor."""
TORCHRUN = "TORCHELASTIC_RUN_ID"
"""Set by torchrun, whose ranks know no lifeline."""
PR_SET_PDEATHSIG = 1

_lock = threading.Lock()
_ends: list[int] = []
"""Reading and writing end of this process's pipe, once a child needs it."""


def _close_in_fork() -> None:
    """A forked child must not hold its parent's pipe open."""
    while _ends:
        os.close(_ends.pop())


os.register_at_fork(after_in_child=_close_in_fork)


def lifeline() -> str:
    """The address that children of this process tie themselves to."""
    with _lock:
        if not _ends:
            _ends.extend(os.pipe())
        return f"{os.getpid()}:{_ends[0]}"


def variables() -> dict[str, str]:
    """Environment variables for a child whose program calls `die_with_parent`."""
    return {VARIABLE: lifeline()}


def die_with_parent() -> None:
    """Tie this process to its parent, if the parent requests it or is torchrun; must be called before all else."""
    address = os.environ.pop(VARIABLE, "")  # it is for this process, not for its children
    if address:
        tie_to(address)
    elif TORCHRUN in os.environ:
        _die_with_parent_thread()


def tie_to(address: str) -> None:
    """Have the kernel kill this process when the process with this lifeline dies.

    Raises:
        OSError: /proc of that process cannot be read, though it lives.
    """
    parent, _, descriptor = address.partition(":")
    watched = _open(f"/proc/{parent}/fd/{descriptor}")
    # Stays open, so that the kernel goes on watching it, until this process ends.
    fcntl.fcntl(watched, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(watched, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(watched, fcntl.F_SETFL, fcntl.fcntl(watched, fcntl.F_GETFL) | os.O_ASYNC)
    if _hung_up(watched):  # the parent died before the kernel watched
        os.kill(os.getpid(), signal.SIGKILL)


def _open(path: str) -> int:
    with contextlib.suppress(FileNotFoundError):
        return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    os.kill(os.getpid(), signal.SIGKILL)  # the parent is dead already
    raise AssertionError("a process outlived its own kill")


def _hung_up(descriptor: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, 0)
    return bool(poll.poll(0))


def _die_with_parent_thread() -> None:
    """Die with the parent's thread that started this process; torchrun starts its ranks from its main thread."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() == 1:  # torchrun died before the kernel watched
        os.kill(os.getpid(), signal.SIGKILL)
