"""Processes that verify answers and can be killed: an answer that hangs or kills its worker costs a deadline, no more.

pebble ends a worker that is late and replaces one that died. The pool has one worker more than may work at a time, so
that the others go on while a replacement imports what it needs.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import wait
from concurrent.futures.process import BrokenProcessPool
from types import FrameType

from pebble import ProcessExpired, ProcessPool

from megatron_r1 import lifeline

START_S = 120.0
"""For a worker to import what it needs, on a machine that is busy."""
POLL_S = 0.5
"""Between two looks at whether a pool that owes a reply still works."""
TRIES = 3
"""Of an answer whose workers go away."""
MEMORY_BYTES = 2 << 30


class WorkersDown(Exception):
    """No worker can be had: nothing is known about the answer."""


class WorkerPool:
    """Workers of one verifier, started when first needed; many threads may ask it."""

    def __init__(
        self, verify: Callable[..., bool], warm_up: Callable[[], object], workers: int, deadline_s: float
    ) -> None:
        """
        Args:
            verify: a module's function of strings, which a worker calls.
            warm_up: what a worker calls before its first answer: slow imports are no part of a deadline.
            workers: answers that are verified at the same time.
            deadline_s: seconds after which an answer is wrong and its worker is killed.
        """
        self._verify, self._warm_up, self._deadline_s = verify, warm_up, deadline_s
        self._turns, self._size = threading.BoundedSemaphore(workers), workers + 1
        self._lock, self._closed = threading.Lock(), False
        self._pool: ProcessPool | None = None
        self.killed = 0
        """Workers that were late or died while they verified an answer."""

    def ask(self, *arguments: str) -> bool:
        """What `verify` says; False where it took longer than the deadline, or killed its worker and another one.

        Raises:
            WorkersDown: workers cannot be started.
        """
        deaths, reason = 0, ""
        with self._turns:
            for _ in range(TRIES):
                try:
                    return self._ask(arguments)
                except (TimeoutError, ProcessExpired) as error:
                    with self._lock:
                        self.killed += 1
                    deaths += 1
                    if isinstance(error, TimeoutError) or deaths == 2:  # once it may be someone else who killed it
                        return False
                except BrokenProcessPool as error:
                    reason = str(error)
        raise WorkersDown(f"they do not start: {reason}")

    def _ask(self, arguments: tuple[str, ...]) -> bool:
        """
        Raises:
            TimeoutError: its worker was late.
            ProcessExpired: its worker died.
            BrokenProcessPool: workers do not start, or one without work was killed: pebble then gives up all of them.
        """
        pool = self._running()
        try:
            task = (self._verify, self._deadline_s, arguments)
            future = pool.schedule(_verdict, args=task, timeout=self._deadline_s)
            until = time.monotonic() + START_S + self._deadline_s
            while not wait([future], POLL_S).done:
                if not pool.active or time.monotonic() > until:  # a pool may end without a word about its tasks
                    raise BrokenProcessPool("no reply")
            return future.result() is True
        except (TimeoutError, ProcessExpired):
            raise
        except (OSError, RuntimeError) as error:
            self._give_up(pool)
            raise BrokenProcessPool(str(error)) from error

    def _running(self) -> ProcessPool:
        with self._lock:
            if self._closed:
                raise WorkersDown("the pool is closed")
            if self._pool is None:
                # Not fork, which would copy the trainer's memory, and its threads in mid-air.
                context = multiprocessing.get_context("spawn")
                initargs = (lifeline.lifeline(), self._warm_up)
                self._pool = ProcessPool(self._size, initializer=_start, initargs=initargs, context=context)
            return self._pool

    def _give_up(self, pool: ProcessPool | None) -> None:
        """End the workers of a pool; the next answer starts others."""
        with self._lock:
            if pool is None or pool is not self._pool:
                return
            self._pool = None
        pool.stop()
        pool.join()

    def close(self) -> None:
        """End all workers."""
        with self._lock:
            self._closed, pool = True, self._pool
        self._give_up(pool)

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class TooLong(BaseException):
    """Not an Exception, so that no library catches it."""


def _alarm(signum: int, frame: FrameType | None) -> None:
    raise TooLong


def _start(trainer: str, warm_up: Callable[[], object]) -> None:
    """What a worker does before its first answer."""
    lifeline.tie_to(trainer)
    os.setsid()  # the terminal's signals are the trainer's
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # pebble's own handler cannot run while native code does
    signal.signal(signal.SIGALRM, _alarm)
    os.environ["OMP_NUM_THREADS"] = "1"
    warm_up()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for output in (1, 2):  # what a library prints about an answer is no news
        os.dup2(nowhere, output)


def _verdict(verify: Callable[..., bool], seconds: float, arguments: tuple[str, ...]) -> bool:
    """What a worker does with one answer.

    Loops of Python are stopped by an alarm after half the deadline, without losing the process; what no alarm stops is
    left to the trainer, and ended by the limit on processor time where the trainer no longer looks.
    """
    used = resource.getrusage(resource.RUSAGE_SELF)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime + seconds) + 2, hard))
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds / 2)
        try:
            return verify(*arguments)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except BaseException:  # an answer that a library cannot digest is no right one, and no exit of the trainer
        return False
