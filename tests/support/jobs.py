"""Runs from the command line on two data-parallel ranks, for tests that disturb them."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from megatron_r1.checkpoint.store import step_folders
from megatron_r1.track.metrics import reproducible
from megatron_r1.track.record import read_metrics
from tests.support.fork_server import Forked, fork_server, run_forked, torchrun
from tests.support.launching import MARK, marked_processes

COMMON = [
    "platform=cpu", "threads=1", "track=off", "seed=3", "model.num_layers=2", "train.schedule.warmup_steps=2",
]  # fmt: skip
PRETRAIN = [
    "pretrain", *COMMON, "data.num_documents=300", "train.sequence_length=64", "train.global_batch_size=4",
    "train.micro_batch_size=2",
]  # fmt: skip
INTERVAL = 3
"""Steps between checkpoints of short runs."""
STEPS = 18
SHORT = [f"train.steps={STEPS}", f"train.save_interval={INTERVAL}"]
RANKS = 2
FORKED_RANK = str(Path(__file__).with_name("forked_rank.py"))
ATTEMPT_S = 100.0
ENDED_S = 10.0
"""In which a launcher ends whose processes are all killed."""
SERVER_GRACE_S = 5.0
"""A server looks once a second whether the rank that started it still lives."""


@dataclass(frozen=True)
class Job:
    """One run from the command line, on two data-parallel ranks."""

    arguments: list[str]
    root: Path
    name: str
    program: str = "megatron_r1"
    """What each rank runs: a module, or a file of Python."""
    forked: bool = False
    """Whether its launcher and ranks are forks of a process that has imported everything, not fresh interpreters."""

    @property
    def folder(self) -> Path:
        return self.root / self.name

    @property
    def rows(self) -> list[dict[str, Any]]:
        return read_metrics(self.folder / "metrics.jsonl")

    @property
    def log(self) -> str:
        """What all its launches have printed."""
        return (self.root / f"{self.name}.log").read_text()

    @property
    def command(self) -> list[str]:
        """The program and its arguments."""
        return [self.program, *self.arguments, f"root='{self.root}'", f"name={self.name}"]

    @property
    def saved(self) -> int:
        """Step of the newest checkpoint; 0 without any."""
        return next((step for step, _ in step_folders(self.folder / "checkpoints")), 0)


Launcher = subprocess.Popen[str] | Forked


@contextlib.contextmanager
def launched(job: Job, **variables: str) -> Iterator[Launcher]:
    """A launch of the job, with its own launcher and these environment variables; it leaves nothing behind."""
    launcher = _launch(job, variables | {MARK: str(job.folder)})
    try:
        yield launcher
    finally:
        for left in processes_of(job, launcher):
            left.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            launcher.wait(ENDED_S)
        if isinstance(launcher, Forked):
            launcher.end()


def _launch(job: Job, variables: dict[str, str]) -> Launcher:
    log = job.root / f"{job.name}.log"
    if job.forked:
        return fork_server().start([*torchrun(RANKS), FORKED_RANK, *job.command], (log, log), variables)
    launcher = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    launcher += [f"--nproc-per-node={RANKS}"]
    module = [] if job.program.endswith(".py") else ["-m"]
    with log.open("a") as output:
        return subprocess.Popen(
            [*launcher, *module, *job.command], stdout=output, stderr=output, text=True, env=os.environ | variables
        )


def processes_of(job: Job, launcher: Launcher) -> list[psutil.Process]:
    """What a launch has started and has not ended, itself included."""
    forks = launcher.processes() if isinstance(launcher, Forked) else []
    return [*forks, *marked_processes(str(job.folder))]


def ranks_of(job: Job, launcher: Launcher) -> dict[int, psutil.Process]:
    """The job's ranks, once there are two of them; none when the launcher has ended before."""
    while launcher.poll() is None:
        found = {}
        for process in processes_of(job, launcher):
            with contextlib.suppress(psutil.NoSuchProcess):
                found[_rank(job, process)] = process
        if {0, 1} <= found.keys():
            return found
        time.sleep(0.02)
    return {}


def _rank(job: Job, process: psutil.Process) -> int:
    """-1 of a process that is no rank."""
    if job.forked:  # the variables of a fork cannot be read; its name tells its rank
        return int(process.name().removeprefix("rank-")) if process.name().startswith("rank-") else -1
    return int(process.environ().get("RANK", -1))


def end_of(job: Job, launcher: Launcher) -> int:
    """Exit code of a launch, which takes everything that it started with it."""
    code = launcher.wait(ATTEMPT_S)
    deadline = time.monotonic() + SERVER_GRACE_S
    while (left := processes_of(job, launcher)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left
    return code


def undisturbed(job: Job) -> list[dict[str, Any]]:
    """The rows of a run that nothing kills."""
    with launched(job) as launcher:
        assert end_of(job, launcher) == 0, job.log
        return comparable(job.rows)


def run_alone(job: Job, *prefix: str) -> subprocess.CompletedProcess[str]:
    """The job's command on one rank, without a launcher; where it is no fork, behind the words of `prefix`."""
    if job.forked:
        assert not prefix
        return run_forked(*job.command, seconds=ATTEMPT_S)
    command = [*prefix, sys.executable, "-W", "ignore", "-m", *job.command]
    return subprocess.run(command, capture_output=True, text=True, timeout=ATTEMPT_S, check=False)


def comparable(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows without what the clock says, their floats to the last bit."""
    return [
        {
            key: json.dumps(value, default=str) if not isinstance(value, float) else value.hex()
            for key, value in row.items()
        }
        for row in map(reproducible, rows)
    ]
