"""Time per phase over ranks, and the names of ranks that are slower than the others."""

from __future__ import annotations

import logging
import socket
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch.distributed as dist

from megatron_r1.model.pass_timers import take_work_seconds
from megatron_r1.parallel.comm import all_gather_numbers, all_gather_object
from megatron_r1.parallel.mesh import pipeline_stage
from megatron_r1.parallel.phases import PHASES
from megatron_r1.train.hooks import Hook
from megatron_r1.train.hooks.phases import phase_seconds
from megatron_r1.train.state import TrainState

logger = logging.getLogger(__name__)

OF_STEPS = tuple(phase for phase in PHASES if phase not in ("start", "server_start", "end"))
"""Phases that steps have."""

OVER_RANKS = f"{'min':>10}{'median':>10}{'max':>10}{'slowest rank':>14}"


@dataclass(frozen=True)
class RankTimes:
    """Seconds of one rank in a window of steps."""

    stage: int
    """Its pipeline stage: stages may have different work, ranks of one stage have alike."""
    seconds: Mapping[str, float] = field(default_factory=Counter)
    """By phase."""
    work: Mapping[str, float] = field(default_factory=Counter)
    """Its own work in forward and backward passes, by phase: without waiting for other ranks, see `pass_timers`."""

    def numbers(self) -> list[float]:
        """All of it, in an order that is the same on every rank."""
        return [
            self.stage,
            *(self.seconds.get(name, 0.0) for name in OF_STEPS),
            *(self.work.get(name, 0.0) for name in OF_STEPS),
        ]

    def __add__(self, other: RankTimes) -> RankTimes:
        return RankTimes(
            self.stage, Counter(self.seconds) + Counter(other.seconds), Counter(self.work) + Counter(other.work)
        )

    @classmethod
    def of_numbers(cls, numbers: Sequence[float]) -> RankTimes:
        seconds, work = numbers[1 : 1 + len(OF_STEPS)], numbers[1 + len(OF_STEPS) :]
        return cls(int(numbers[0]), dict(zip(OF_STEPS, seconds, strict=True)), dict(zip(OF_STEPS, work, strict=True)))


class RankTimesHook(Hook):
    """Adds, every `interval` steps and after the last, what phases took over ranks. Collective: every rank has one.

    A rank is slow when the median work of its pipeline stage's ranks is below `threshold` of its own, as NVIDIA's
    resiliency extension scores ranks (its threshold is 0.7 too). It is named in the log and in the row once, after two
    windows in a row: in one alone, the first passes of a process or a pause may be the reason.
    """

    def __init__(self, interval: int, steps: int, threshold: float, device: str):
        """
        Args:
            interval: steps of a window.
            steps: of the run.
            threshold: 0 names no rank.
            device: torch's name of the device of the models.
        """
        self._interval, self._steps, self._threshold, self._device = interval, steps, threshold, device
        self._seconds: Counter[str] = Counter()
        self._start = self._since = -1
        self._total: list[RankTimes] = []
        self._slow_before: frozenset[int] = frozenset()
        self._named: frozenset[int] = frozenset()

    def before_step(self, state: TrainState) -> None:
        if self._start < 0:
            self._start = self._since = state.step

    def after_step(self, state: TrainState, row: dict[str, Any]) -> None:
        self._seconds.update(phase_seconds(row))
        if state.step % self._interval == 0 or state.step == self._steps:
            row |= self._of_window(state.step)

    def finish(self, state: TrainState) -> None:
        if dist.get_rank() == 0 and self._total and self._since > self._start:
            first, last = self._start + 1, self._since
            logger.info("time of steps %d to %d\n%s", first, last, phase_table(self._total, self._since - self._start))

    def _of_window(self, step: int) -> dict[str, Any]:
        """Collective: metrics of the steps since the last window."""
        since, self._since = self._since, step
        mine = RankTimes(pipeline_stage(), self._seconds, take_work_seconds(self._device))
        self._seconds = Counter()
        alone = dist.get_world_size() == 1
        ranks = [RankTimes.of_numbers(numbers) for numbers in all_gather_numbers(mine.numbers())]
        self._total = [a + b for a, b in zip(self._total, ranks, strict=True)] if self._total else ranks
        return {} if alone else dict(metrics_over_ranks(ranks, step - since)) | self._stragglers(ranks, since, step)

    def _stragglers(self, ranks: Sequence[RankTimes], since: int, step: int) -> dict[str, Any]:
        """Collective: names the ranks that are slow for the second time in a row, and were not named before."""
        slow = slow_ranks(ranks, self._threshold)
        new = sorted((slow.keys() & self._slow_before) - self._named)
        self._slow_before, self._named = frozenset(slow), self._named | {*new}
        if not new:
            return {}
        hosts = all_gather_object(socket.gethostname())
        if dist.get_rank() == 0:
            for rank in new:
                logger.warning(
                    "rank %d on %s is slow: in steps %d to %d its forward and backward passes took %.1f times as long "
                    "as the median of the ranks with the same layers",
                    *(rank, hosts[rank], since + 1, step, slow[rank]),
                )
        return {"perf/stragglers": {f"rank {rank} on {hosts[rank]}": slow[rank] for rank in new}}


def slow_ranks(ranks: Sequence[RankTimes], threshold: float) -> dict[int, float]:
    """The slow ranks, by index, each with its own work as a multiple of the median of its pipeline stage's ranks."""
    work = [sum(times.work.values()) for times in ranks]
    of_stages: dict[int, list[float]] = {}
    for own, times in zip(work, ranks, strict=True):
        of_stages.setdefault(times.stage, []).append(own)
    middles = {stage: median(of_stage) for stage, of_stage in of_stages.items()}
    slow = {}
    for rank, (own, times) in enumerate(zip(work, ranks, strict=True)):
        if 0 < (middle := middles[times.stage]) < threshold * own:
            slow[rank] = own / middle
    return slow


@dataclass(frozen=True)
class PhaseSpread:
    """Seconds of one phase over ranks."""

    phase: str
    seconds: Sequence[float]
    """Of each rank."""
    slowest: int
    """The rank with most work of its own where the phase has passes, for there all ranks are as long as the slowest;
    elsewhere the rank that is longest in it."""


def spreads(ranks: Sequence[RankTimes]) -> Iterator[PhaseSpread]:
    """The phases in which any rank was."""
    for name in OF_STEPS:
        seconds, work = ([column.get(name, 0.0) for column in columns] for columns in _columns(ranks))
        if any(seconds):
            decisive = work if any(work) else seconds
            yield PhaseSpread(name, seconds, decisive.index(max(decisive)))


def _columns(ranks: Sequence[RankTimes]) -> tuple[list[Mapping[str, float]], list[Mapping[str, float]]]:
    return [times.seconds for times in ranks], [times.work for times in ranks]


def metrics_over_ranks(ranks: Sequence[RankTimes], steps: int) -> Iterator[tuple[str, float]]:
    """Smallest, median and largest seconds of a step by phase, and of passes; and each phase's slowest rank."""
    for spread in spreads(ranks):
        low, middle, high = _extent(spread.seconds, steps)
        yield f"perf/phase_seconds_min/{spread.phase}", low
        yield f"perf/phase_seconds_median/{spread.phase}", middle
        yield f"perf/phase_seconds_max/{spread.phase}", high
        yield f"perf/slowest_rank/{spread.phase}", spread.slowest
    if any(work := [sum(times.work.values()) for times in ranks]):
        low, middle, high = _extent(work, steps)
        yield from (("perf/pass_seconds_min", low), ("perf/pass_seconds_median", middle))
        yield "perf/pass_seconds_max", high


def _extent(seconds: Sequence[float], steps: int) -> tuple[float, float, float]:
    """Smallest, median and largest, of one step."""
    return min(seconds) / steps, median(seconds) / steps, max(seconds) / steps


def phase_table(ranks: Sequence[RankTimes], steps: int) -> str:
    """Each phase's seconds of a step and share of rank 0's time; with several ranks also the spread over them."""
    found = sorted(spreads(ranks), key=lambda spread: -spread.seconds[0])
    whole = sum(spread.seconds[0] for spread in found) or 1.0
    several = len(ranks) > 1
    lines = [f"{'phase':<12}{'s a step':>10}{'share':>8}" + (OVER_RANKS if several else "")]
    for spread in found:
        line = f"{spread.phase:<12}{spread.seconds[0] / steps:>10.3f}{spread.seconds[0] / whole:>8.1%}"
        three = "".join(f"{value:>10.3f}" for value in _extent(spread.seconds, steps))
        lines.append(line + (f"{three}{spread.slowest:>14}" if several else ""))
    return "\n".join(lines)
