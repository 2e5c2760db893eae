"""Traces some steps: what every operator of a rank takes, in time and memory."""

from __future__ import annotations

import logging
import os
import resource
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from megatron_r1.config.profile import ProfileConfig
from megatron_r1.errors import ConfigError
from megatron_r1.train.hooks import Hook
from megatron_r1.train.state import TrainState

logger = logging.getLogger(__name__)

FOLDER = "profile"
OPERATORS = 40
"""Lines of each table."""
MEMORY_EVENTS = 1_000_000
"""Allocations that a memory snapshot goes back."""


class ProfileHook(Hook):
    """Traces a window of steps on this rank.

    The trace begins before the first step and ends when the hooks before this one have followed the last, so it shows
    saves and evaluations too.
    """

    def __init__(self, run_folder: Path, settings: ProfileConfig, rank: int, cuda: bool):
        """
        Args:
            run_folder: files go into its folder `profile`.
            rank: for the files' names.
            cuda: whether to trace the GPU too, and to keep where its memory was allocated.
        """
        self._folder, self._settings, self._rank, self._cuda = run_folder / FOLDER, settings, rank, cuda
        self._profiler: profile | None = None
        self._first = 0
        self._step: record_function | None = None

    def before_step(self, state: TrainState) -> None:
        step = state.step + 1
        if not self._profiler and self._settings.first_step <= step <= self._settings.last_step:
            self._first = step
            self._start()
        if self._profiler:
            self._step = record_function(f"step {step}")
            self._step.__enter__()

    def after_step(self, state: TrainState, row: dict[str, Any]) -> None:
        if self._step:
            self._step.__exit__(None, None, None)
            self._step = None
        if self._profiler and state.step == self._settings.last_step:
            self._write(self._profiler, state.step)

    def finish(self, state: TrainState) -> None:
        """Write the steps so far of a window that the end of the run cuts."""
        if self._profiler:
            self._write(self._profiler, state.step)

    def _start(self) -> None:
        os.environ.setdefault(
            "KINETO_LOG_LEVEL", "99"
        )  # else it says on the terminal that it starts, and what it lacks
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._cuda else [])]
        self._profiler = profile(activities=activities, profile_memory=True)
        if self._cuda:
            torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS, stacks="python")
        self._profiler.start()

    def _write(self, profiler: profile, last: int) -> None:
        self._profiler = None
        profiler.stop()
        self._folder.mkdir(exist_ok=True)
        name = f"steps-{self._first}-{last}-rank-{self._rank}"
        if self._cuda:
            torch.cuda.memory._dump_snapshot(str(self._folder / f"{name}.memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        profiler.export_chrome_trace(str(self._folder / f"{name}.trace.json.gz"))
        (self._folder / f"{name}.txt").write_text(operator_tables(profiler, self._cuda), encoding="utf-8")
        logger.info("profile of steps %d to %d: %s", self._first, last, self._folder / f"{name}.*")


def profile_hooks(run_folder: Path, settings: ProfileConfig, steps: int, rank: int, cuda: bool) -> list[ProfileHook]:
    """The hook of this rank, if it is to trace.

    Args:
        steps: of the run.

    Raises:
        ConfigError: the run has no such steps.
    """
    if not settings.steps:
        return []
    if settings.last_step > steps:
        raise ConfigError("profile.steps", settings.steps, f"must be within the {steps} steps of the run")
    return [ProfileHook(run_folder, settings, rank, cuda)] if rank in settings.ranks else []


def operator_tables(profiler: profile, cuda: bool) -> str:
    """The operators that take most time and that allocate most, each without the operators that it calls."""
    averages, device = profiler.key_averages(), "cuda" if cuda else "cpu"

    def table(what: str, key: str) -> str:
        text: str = averages.table(sort_by=f"self_{device}_{key}", row_limit=OPERATORS, max_name_column_width=60)
        return f"Operators that {what}\n{text}\n"

    # In KiB on Linux; the largest of the process so far.
    resident = (
        f"Peak resident memory of the process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024} MiB\n"
    )
    if cuda:
        allocated = torch.cuda.max_memory_allocated() / 2**20
        resident += f"Peak memory that torch allocated on the GPU: {allocated:.0f} MiB\n"
    return "\n".join([table("take most time", "time_total"), table("allocate most", "memory_usage"), resident])
