"""Run a program on several ranks that are forked from one process, which has imported everything.

    run_ranks("tests/dist/ranks_layouts.py", folder, ranks=2, seconds=100)

A rank is then there at once, where one that torchrun starts takes five seconds of a core to import torch and
megatron-core. The process to fork from is started with the first ranks, once for all tests of a pytest process, and
ends with it. A program has what torchrun would give it: its arguments, and the variables by which ranks find each
other. Its megatron-core is that of a CPU without Transformer Engine (tests/transformer_engine has the other).
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from megatron_r1.lifeline import lifeline, tie_to
from megatron_r1.platform.ports import free_ports
from tests.support.launching import rank_variables

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["tests.support.rank_imports"])


def run_ranks(program: str | Path, *arguments: object, ranks: int, seconds: float) -> None:
    """Run a program to its end on so many ranks; all must succeed, and nothing that they started is left behind.

    Raises:
        AssertionError: a rank failed, or was not done in these seconds; with what all of them printed.
    """
    [port] = free_ports(1)
    with tempfile.NamedTemporaryFile("r", prefix="ranks-", suffix=".log") as log:
        started = [
            _FORKS.Process(
                target=_run_rank,
                args=(str(program), [*map(str, arguments)], dict(os.environ), log.name, lifeline()),
                kwargs={"variables": rank_variables(rank, ranks, port)},
            )
            for rank in range(ranks)
        ]
        try:
            for process in started:
                process.start()
            failure = _first_failure(started, seconds)
        finally:
            for process in started:
                _end(process)
        assert not failure, f"{program} {' '.join(map(str, arguments))}: {failure}\n{log.read()}"


def _first_failure(started: Sequence[ForkServerProcess], seconds: float) -> str:
    """What went wrong first, as soon as it did; nothing once all ranks have succeeded."""
    deadline = time.monotonic() + seconds
    running = dict(enumerate(started))
    while running:
        ended = wait([process.sentinel for process in running.values()], deadline - time.monotonic())
        if not ended:
            return f"after {seconds:.0f} s rank {', '.join(map(str, running))} of {len(started)} still runs"
        for rank, process in [*running.items()]:
            if process.sentinel in ended:
                process.join()
                if process.exitcode:
                    return f"rank {rank} of {len(started)} ended with {process.exitcode}"
                del running[rank]
    return ""


def _end(process: ForkServerProcess) -> None:
    """Kill a rank that still runs, and whatever it started."""
    if process.pid is None:
        return
    process.kill()
    process.join()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.close()


def _run_rank(
    program: str, arguments: list[str], environment: dict[str, str], log: str, parent: str, variables: dict[str, str]
) -> None:
    """In the forked process: run the program as `python` would."""
    os.setpgid(0, 0)
    tie_to(parent)
    output = os.open(log, os.O_WRONLY | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    os.environ.clear()
    os.environ.update(environment | variables)
    sys.argv = [program, *arguments]
    runpy.run_path(program, run_name="__main__")
