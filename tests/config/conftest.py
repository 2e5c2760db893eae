"""The real command line in a process of its own, with what it cost."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
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
def run_command() -> Callable[..., CommandResult]:
    """`run_command(*arguments, cwd=..., NAME=value)` runs `megatron-r1` and waits for it."""
    return _run_command
