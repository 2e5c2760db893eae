"""The real command line in a process of its own, with what it cost."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class CommandResult:
    """Result of one command."""

    status: int
    stdout: str
    stderr: str
    seconds: float
    """Wall-clock time; other processes of the machine lengthen it."""
    processor_seconds: float
    """Time on a core, user and system: what `seconds` is on an idle machine, the file system aside."""


def _run_command(*arguments: str, cwd: Path = REPOSITORY, **environment: str) -> CommandResult:
    start = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-m", "megatron_r1", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)} | environment,
    ) as process:
        assert process.stdout and process.stderr
        out, err = process.stdout.read(), process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - start
    return CommandResult(process.returncode, out, err, seconds, usage.ru_utime + usage.ru_stime)


@pytest.fixture(scope="session")
def hydra_seconds() -> float:
    """Seconds that this machine takes to import Hydra, as busy as it is: what a command without torch is measured by.

    Processes that share a core, or a slow one, lengthen both alike.
    """
    statement = "import resource, hydra; print(sum(resource.getrusage(resource.RUSAGE_SELF)[:2]))"
    command = [sys.executable, "-c", statement]
    with ThreadPoolExecutor(2) as pool:
        printed = [pool.submit(subprocess.check_output, command, text=True) for _ in range(6)]
        return statistics.median(float(one.result()) for one in printed)


@pytest.fixture(scope="session")
def run_command() -> Callable[..., CommandResult]:
    """`run_command(*arguments, cwd=..., NAME=value)` runs `megatron-r1` and waits for it."""
    return _run_command
