"""Processes that judge answers and can be killed: an answer that hangs or kills its judge costs a deadline, no more.

A worker is a Python module that reads one JSON object a line and writes one JSON value a line. One more than may work
at a time is kept, so that the rest go on at once while the place of a killed one is filled.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import threading
import time
from typing import Any

from megatron_r1 import lifeline

START_S = 120.0
"""For a worker to import what it needs, on a machine that is busy."""
LONGEST_REPLY = 1 << 16


class WorkersDown(Exception):
    """No worker can be had: nothing is known about the answer."""


class Timeout(Exception):
    """No reply by the deadline; the worker was killed."""


class Died(Exception):
    """The worker ended while it worked."""


class Worker:
    """One process; used by one thread at a time."""

    def __init__(self, module: str, arguments: list[str]):
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "WANDB"))}
        path = os.pathsep.join(part for part in sys.path if part)
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | lifeline.variables(),
            start_new_session=True,  # Ctrl-C is the trainer's; workers end when their standard input does
        )
        self._ready = False

    @property
    def pid(self) -> int:
        return self._process.pid

    def ready(self, seconds: float) -> bool:
        """Whether it has said that it can work, waiting at most so long; raises Died."""
        if not self._ready:
            with contextlib.suppress(Timeout):
                self._read(seconds)
                self._ready = True
        return self._ready

    def ask(self, item: Any, seconds: float) -> Any:
        """Its reply; raises Timeout or Died, after either of which it is of no more use."""
        assert self._process.stdin
        try:
            self._process.stdin.write(json.dumps(item).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise Died from None
        return self._read(seconds)

    def _read(self, seconds: float) -> Any:
        assert self._process.stdout
        descriptor, until, said = self._process.stdout.fileno(), time.monotonic() + seconds, b""
        while not said.endswith(b"\n"):
            if not select.select([descriptor], [], [], max(0.0, until - time.monotonic()))[0]:
                raise Timeout
            part = os.read(descriptor, LONGEST_REPLY)
            if not part:
                raise Died
            said += part
        return json.loads(said)

    def kill(self) -> None:
        """End it and wait for its end."""
        self._process.kill()
        for stream in (self._process.stdin, self._process.stdout):
            if stream:
                with contextlib.suppress(OSError):
                    stream.close()
        self._process.wait()


class WorkerPool:
    """Workers of one module, started when first needed; may be asked by many threads."""

    def __init__(self, module: str, arguments: list[str], workers: int, deadline_s: float):
        self._module, self._arguments, self._deadline_s = module, arguments, deadline_s
        self._turns, self._size = threading.BoundedSemaphore(workers), workers + 1
        self._lock, self._idle, self._closed = threading.Lock(), list[Worker](), False
        self._started = False
        self.killed = 0
        """Workers that were replaced."""

    def ask(self, item: Any) -> Any:
        """The reply of a worker.

        Raises:
            Timeout: the item took longer than the deadline.
            Died: it killed its worker, and another one after that.
            WorkersDown: workers cannot be started.
        """
        with self._turns:
            try:
                return self._ask(item)
            except Died:
                return self._ask(item)  # a worker may have been killed by someone else

    def _ask(self, item: Any) -> Any:
        worker = self._take()
        try:
            reply = worker.ask(item, self._deadline_s)
        except BaseException:
            self._replace(worker)
            raise
        self._give_back(worker)
        return reply

    def _take(self) -> Worker:
        """A worker that can work; one that has started is preferred to one that is still starting."""
        for _ in range(self._size + 1):
            with self._lock:
                if self._closed:
                    raise WorkersDown("the pool is closed")
                self._fill()
                worker = next((worker for worker in self._idle if self._can_work(worker)), self._idle[0])
                self._idle.remove(worker)
            try:
                if worker.ready(START_S):
                    return worker
            except Died:
                pass
            self._replace(worker)
        raise WorkersDown(f"{self._module} does not start")

    def _fill(self) -> None:
        try:
            while not self._started or not self._idle:
                self._idle.append(Worker(self._module, self._arguments))
                self._started = self._started or len(self._idle) == self._size
        except OSError as error:
            raise WorkersDown(f"{self._module} does not start: {error.strerror or error}") from error

    @staticmethod
    def _can_work(worker: Worker) -> bool:
        try:
            return worker.ready(0)
        except Died:
            return False

    def _replace(self, worker: Worker) -> None:
        worker.kill()
        self.killed += 1
        with self._lock, contextlib.suppress(OSError):  # a start that fails now is tried again when one is needed
            if not self._closed and len(self._idle) < self._size:
                self._idle.append(Worker(self._module, self._arguments))

    def _give_back(self, worker: Worker) -> None:
        with self._lock:
            if not self._closed:
                self._idle.append(worker)
                return
        worker.kill()

    def close(self) -> None:
        """End all workers."""
        with self._lock:
            self._closed, idle, self._idle = True, self._idle, []
        for worker in idle:
            worker.kill()

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
