"""The seconds of a step with many micro-batches, from a shorter one: a pipeline soon repeats itself.

Each pass begins at the later of two earlier ends plus a constant, so the ends of a period's passes are a max-plus
linear function of those of the period before. Where every end of a period is later by one and the same amount than in
the period before, so it is in all later periods: a step with further periods takes that much longer for each of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import isclose

from megatron_r1.plan.pipeline.orders import ScheduleShape, build_schedule
from megatron_r1.plan.pipeline.schedule import ChunkPass, Schedule
from megatron_r1.plan.pipeline.simulate import Durations, Timeline, simulate


def step_seconds(shape: ScheduleShape, durations: Durations) -> float:
    """`simulate(build_schedule(shape), durations).seconds`, without simulating every micro-batch where it repeats.

    Equal to the whole simulation but for rounding; as slow as that where no period repeats the one before.

    Raises:
        ScheduleDeadlock: some ranks would wait for ever.
    """
    size = _first_size(shape)
    while size < shape.micro_batches:
        timeline = _simulated(shape, size, durations)
        period, growth = _steady_state(timeline, shape)
        if period:
            size += (shape.micro_batches - size) % period
            seconds = timeline.seconds if size == timeline.schedule.micro_batches else 0.0
            seconds = seconds or _simulated(shape, size, durations).seconds
            return seconds + (shape.micro_batches - size) // period * growth
        size += size // shape.period * shape.period
    return simulate(build_schedule(shape), durations).seconds


def _simulated(shape: ScheduleShape, micro_batches: int, durations: Durations) -> Timeline:
    return simulate(build_schedule(shape.with_micro_batches(micro_batches)), durations)


def _first_size(shape: ScheduleShape) -> int:
    """Micro-batches after which most pipelines repeat themselves, with the same last group as all of them have."""
    longest = 4 * (shape.period if shape.name == "interleaved" else shape.pipeline)
    return -(-longest // shape.period) * shape.period + shape.micro_batches % shape.period


def _steady_state(timeline: Timeline, shape: ScheduleShape) -> tuple[int, float]:
    """Micro-batches of a period that repeats the one before, and the seconds that it takes; 0 where none does.

    Where ranks wait for one another's messages, the times of as many micro-batches as there are ranks may alternate.
    """
    runs = _repeating(timeline.schedule, shape.period)
    for periods in range(1, max(2, shape.pipeline) + 1):
        growth = _growth(timeline, runs, periods, shape.pipeline)
        if growth is not None:
            return periods * shape.period, growth
    return 0, 0.0


def _growth(timeline: Timeline, runs: Sequence[tuple[int, int, int]], periods: int, pipeline: int) -> float | None:
    """Seconds by which all the last passes that repeat are later than so many periods before; None if they differ."""
    ends, growth = timeline.ends, None
    for nodes, (first, last, length) in zip(timeline.graph.node_of, runs, strict=True):
        distance = periods * length
        # Ranks repeat from different passes on: as many more must agree as those can be from one another.
        begin = last - (periods - 1) * length - distance - 4 * pipeline
        if begin < first:
            return None
        for position in range(begin, last - (periods - 1) * length):
            later = ends[nodes[position + distance]] - ends[nodes[position]]
            if growth is None:
                growth = later
            elif not isclose(later, growth, rel_tol=1e-9):
                return None
    return growth


@lru_cache(16)
def _repeating(schedule: Schedule, period: int) -> list[tuple[int, int, int]]:
    """For each rank (first, last, length): passes first to last - 1 come again `length` passes later.

    They are those of the micro-batches that are `period` later.
    """
    shift = period // len(schedule.routes)
    return [_longest_run(passes, shift, len(passes) * period // schedule.micro_batches) for passes in schedule.order]


def _longest_run(passes: Sequence[ChunkPass], shift: int, length: int) -> tuple[int, int, int]:
    best, first = (0, 0), 0
    for position, (each, later) in enumerate(zip(passes, passes[length:], strict=False)):
        if each.micro_batch + shift != later.micro_batch or each.kind != later.kind or each.chunk != later.chunk:
            first = position + 1
        elif position + 1 - first > best[1] - best[0]:
            best = first, position + 1
    return *best, length
