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
from tests.support.launching import marked_processes

COMMON = [
    "platform=cpu", "threads=1", "track=off", "seed=3", "data.num_documents=2000", "model.num_layers=2",
    "train.schedule.warmup_steps=2",
]  # fmt: skip
PRETRAIN = [
    "pretrain", *COMMON, "train.sequence_length=64", "train.global_batch_size=4", "train.micro_batch_size=2",
]  # fmt: skip
INTERVAL = 2
"""Steps between checkpoints of short runs."""
SHORT = ["train.steps=40", f"train.save_interval={INTERVAL}"]
ATTEMPT_S = 100.0
SERVER_GRACE_S = 5.0
"""A server looks once a second whether the rank that started it still lives."""


@dataclass(frozen=True)
class Job:
    """One run from the command line, on two data-parallel ranks."""

    arguments: list[str]
    root: Path
    name: str
    program: tuple[str, ...] = ("-m", "megatron_r1")
    """What each rank runs."""

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
    def saved(self) -> int:
        """Step of the newest checkpoint; 0 without any."""
        return next((step for step, _ in step_folders(self.folder / "checkpoints")), 0)


@contextlib.contextmanager
def launched(job: Job, **variables: str) -> Iterator[subprocess.Popen[str]]:
    """A launch of the job, with its own launcher and these environment variables; it leaves nothing behind."""
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [*job.program, *job.arguments, f"root='{job.root}'", f"name={job.name}"]
    environment = os.environ | variables | {"MEGATRON_R1_TEST": str(job.folder)}
    with (job.root / f"{job.name}.log").open("a") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, text=True, env=environment)
    try:
        yield process
    finally:
        for left in marked_processes(str(job.folder)):
            left.kill()
        process.wait()


def ranks_of(job: Job, launcher: subprocess.Popen[str]) -> dict[int, psutil.Process]:
    """The job's ranks, once there are two of them; none when the launcher has ended before."""
    while launcher.poll() is None:
        found = {int(process.environ().get("RANK", -1)): process for process in marked_processes(str(job.folder))}
        if {0, 1} <= found.keys():
            return found
        time.sleep(0.02)
    return {}


def end_of(job: Job, launcher: subprocess.Popen[str]) -> int:
    """Exit code of a launch, which takes everything that it started with it."""
    code = launcher.wait(ATTEMPT_S)
    deadline = time.monotonic() + SERVER_GRACE_S
    while (left := marked_processes(str(job.folder))) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left
    return code


def undisturbed(job: Job) -> tuple[list[dict[str, Any]], float]:
    """The rows of a run that nothing kills, and how many seconds its ranks lived."""
    with launched(job) as launcher:
        assert ranks_of(job, launcher)
        started = time.monotonic()
        assert end_of(job, launcher) == 0, job.log
        return comparable(job.rows), time.monotonic() - started


def run_alone(job: Job, *prefix: str) -> subprocess.CompletedProcess[str]:
    """The job's command on one rank, without a launcher, behind the words of `prefix`."""
    command = [*prefix, sys.executable, "-W", "ignore", *job.program, *job.arguments]
    command += [f"root='{job.root}'", f"name={job.name}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)


def comparable(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows without what the clock says, their floats to the last bit."""
    return [
        {
            key: json.dumps(value, default=str) if not isinstance(value, float) else value.hex()
            for key, value in row.items()
        }
        for row in map(reproducible, rows)
    ]
