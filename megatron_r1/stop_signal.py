"""USR1, by which a scheduler warns that a job's time is nearly up: blocked until the program looks for it.

A process that does nothing about USR1 dies of it. SLURM sends it at any time, also while Python imports, and to all
processes of a rank: to servers, workers that score and wandb as well. A blocked signal waits, and what a process starts
inherits the block, so nothing dies of it; the rank finds it after its step.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

SIGNAL = signal.SIGUSR1


def block() -> None:
    """Let the signal wait, in this process and in those that it starts; to be called before a thread starts."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {SIGNAL})


def received() -> bool:
    """Whether the signal has come since the last look."""
    return signal.sigtimedwait({SIGNAL}, 0) is not None


def restore_default() -> None:
    """Let the signal end this process, at once where it has come."""
    signal.signal(SIGNAL, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {SIGNAL})


@contextmanager
def blocked() -> Iterator[None]:
    """What starts meanwhile blocks the signal, as does this process."""
    with _mask(signal.SIG_BLOCK):
        yield


@contextmanager
def unblocked() -> Iterator[None]:
    """The signal goes to this process's own handler meanwhile."""
    with _mask(signal.SIG_UNBLOCK):
        yield


@contextmanager
def _mask(how: int) -> Iterator[None]:
    before = signal.pthread_sigmask(how, {SIGNAL})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
