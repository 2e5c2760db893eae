"""USR1, by which a scheduler warns that a job's time is nearly up: kept until the program looks for it.

A process that does nothing about USR1 dies of it. SLURM sends it at any time, also while Python imports, and to all
processes of a rank: to servers, workers that score and wandb as well. A blocked signal waits, and what a process starts
inherits the block, so nothing dies of it; the rank finds it after its step.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

WARNING = signal.SIGUSR1


def keep() -> None:
    """From now on the signal waits, in this process and in those that it starts; call it before a thread starts."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {WARNING})


def came() -> bool:
    """Whether the signal has come since the last look."""
    return signal.sigtimedwait({WARNING}, 0) is not None


def end_by_it() -> None:
    """Let the signal end this process, at once where it has come."""
    signal.signal(WARNING, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {WARNING})


@contextmanager
def kept() -> Iterator[None]:
    """What starts meanwhile keeps the signal, as does this process."""
    with _mask(signal.SIG_BLOCK):
        yield


@contextmanager
def handled() -> Iterator[None]:
    """The signal goes to this process's own handler meanwhile."""
    with _mask(signal.SIG_UNBLOCK):
        yield


@contextmanager
def _mask(how: int) -> Iterator[None]:
    before = signal.pthread_sigmask(how, {WARNING})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
