"""Each pass begins as soon as its rank is free and what it needs is there; ranks that wait for ever are named."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from megatron_r1.plan.pipeline import steady
from megatron_r1.plan.pipeline.graph import ScheduleDeadlock
from megatron_r1.plan.pipeline.orders import ORDERS, ScheduleShape, build_schedule
from megatron_r1.plan.pipeline.schedule import ChunkPass, Schedule
from megatron_r1.plan.pipeline.simulate import Durations, PassEvent, Timeline, simulate
from megatron_r1.plan.pipeline.steady import step_seconds


@some.composite
def shapes(draw, largest: int = 12) -> ScheduleShape:
    name = draw(some.sampled_from(sorted(ORDERS)))
    ranks = draw(some.sampled_from([2, 4] if name == "dualpipe" else [1, 2, 3, 5]))
    if name == "dualpipe":
        return ScheduleShape(name, ranks, 2 * draw(some.integers(ranks, ranks + largest)))
    if name != "interleaved" or ranks == 1:
        return ScheduleShape(name if ranks > 1 else "1f1b", ranks, draw(some.integers(1, 2 * largest)))
    group = draw(some.integers(ranks, ranks + 2))
    rest = draw(some.sampled_from([0, *range(ranks, group)]))
    micro_batches = group * draw(some.integers(1, largest)) + rest
    return ScheduleShape(name, ranks, micro_batches, draw(some.integers(2, 3)), group, draw(some.booleans()))


@some.composite
def durations(draw, stages: int) -> Durations:
    seconds = some.lists(some.floats(0.5, 2.0), min_size=stages, max_size=stages)
    forward, inputs, weights = draw(seconds), draw(seconds), draw(seconds)
    saves = draw(some.lists(some.floats(0.0, 0.5), min_size=stages, max_size=stages))
    return Durations(forward, inputs, weights, draw(some.sampled_from([0.0, 0.1, 0.7])), draw(some.booleans()), saves)


@some.composite
def steps(draw, largest: int = 12) -> tuple[ScheduleShape, Durations]:
    shape = draw(shapes(largest))
    return shape, draw(durations(shape.pipeline * shape.virtual_pipeline))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(steps(largest=6))
def test_each_pass_begins_when_its_rank_is_free_and_what_it_needs_has_arrived(step):
    """Worked out again from the events alone, pass by pass."""
    shape, seconds = step
    timeline = simulate(build_schedule(shape), seconds)
    sending = [event for event in timeline.events if event.kind != "backward_weight"]
    ended = {(event.kind[:8], event.micro_batch, stage_of(event, timeline.schedule)): event for event in sending}
    for rank in range(shape.pipeline):
        mine = [event for event in timeline.events if event.rank == rank]
        free = 0.0
        for pair in grouped(mine):
            needed = [ended[key] for each in pair if (key := needs(each, timeline.schedule))]
            delays = [seconds.p2p * (each.rank != rank) for each in needed]
            arrived = max([each.end + delay for each, delay in zip(needed, delays, strict=True)], default=0.0)
            assert pair[0].start == pytest.approx(max(free, arrived)) == pair[-1].start
            sends = any(sends_on(each, timeline.schedule) for each in pair)
            free = pair[0].end + seconds.p2p * sends * (not seconds.p2p_overlaps)
        busy = sum(pair[0].end - pair[0].start for pair in grouped(mine))
        assert timeline.busy[rank] == pytest.approx(busy) and timeline.idle[rank] >= -1e-9
    assert timeline.seconds == pytest.approx(max(event.end for event in timeline.events))


def stage_of(event: PassEvent, schedule: Schedule) -> int:
    return schedule.stage_of()[schedule.direction(event.micro_batch), event.rank, event.chunk]


def grouped(events: list[PassEvent]) -> list[list[PassEvent]]:
    """Events that overlap together, others alone."""
    groups: list[list[PassEvent]] = []
    for event in events:
        if event.paired and groups and groups[-1][0].paired and len(groups[-1]) == 1:
            groups[-1].append(event)
        else:
            groups.append([event])
    return groups


def needs(event: PassEvent, schedule: Schedule) -> tuple[str, int, int] | None:
    stage, number = stage_of(event, schedule), event.micro_batch
    if event.kind == "forward":
        return ("forward", number, stage - 1) if stage else None
    if event.kind == "backward_weight":
        return None  # its own rank's earlier pass
    return ("backward", number, stage + 1) if stage < schedule.stages - 1 else ("forward", number, stage)


def sends_on(event: PassEvent, schedule: Schedule) -> bool:
    stage, route = stage_of(event, schedule), schedule.routes[schedule.direction(event.micro_batch)]
    other = stage + 1 if event.kind == "forward" else stage - 1
    return event.kind != "backward_weight" and 0 <= other < len(route) and route[other][0] != event.rank


@settings(max_examples=80, deadline=None, derandomize=True)
@given(steps(largest=40))
def test_long_steps_take_what_their_whole_simulation_takes(step):
    shape, seconds = step
    assert step_seconds(shape, seconds) == pytest.approx(simulate(build_schedule(shape), seconds).seconds, rel=1e-9)


def test_long_steps_are_not_simulated_micro_batch_by_micro_batch(monkeypatch):
    simulated = []

    def counted(schedule: Schedule, given: Durations) -> Timeline:
        simulated.append(schedule)
        return simulate(schedule, given)

    monkeypatch.setattr(steady, "simulate", counted)
    shape = ScheduleShape("interleaved", 16, 256, 8)
    seconds = step_seconds(shape, Durations.equal(128, 1.0, 1.0, 0.5, p2p=0.01))
    assert [schedule.micro_batches for schedule in simulated] == [64]
    assert seconds == pytest.approx(256 * 8 * 2.5 + 15 * 2.5, rel=0.01)
    assert step_seconds(ScheduleShape("1f1b", 8, 10**6), Durations.equal(8, 1.0, 1.0, 1.0)) == 3.0 * (10**6 + 7)


def test_messages_delay_a_pipeline_but_not_its_steady_state():
    """A step of one micro-batch takes two messages between each two ranks; of many, interleaving hides the others."""
    alone = simulate(build_schedule(ScheduleShape("1f1b", 4, 1)), Durations.equal(4, 1.0, 1.0, 1.0, p2p=0.25))
    assert alone.seconds == 4 * 3 + 6 * 0.25
    shape, given = ScheduleShape("interleaved", 4, 64, 2), Durations.equal(8, 1.0, 1.0, 1.0, p2p=0.25)
    hidden, sent = (simulate(build_schedule(shape), replace(given, p2p_overlaps=each)) for each in (True, False))
    assert hidden.seconds < 64 * 6 + 9 + 32 * 0.25 < 64 * 6 + 9 + 64 * 2 * 0.25 < sent.seconds
    assert hidden.busy == sent.busy == [64 * 6] * 4 and hidden.bubble < sent.bubble


def test_ranks_that_wait_for_one_another_are_named():
    route = ((0, 0), (1, 0))
    first = (ChunkPass("forward", 0, 0), ChunkPass("backward", 0, 0))
    with pytest.raises(ScheduleDeadlock) as found:
        simulate(Schedule("mine", 1, (route,), (first, first[::-1])), Durations.equal(2, 1.0, 1.0, 1.0))
    assert str(found.value) == (
        "mine: rank 0 waits before backward of micro-batch 0, chunk 0, for rank 1 to run its backward through stage 1; "
        "rank 1 waits before backward of micro-batch 0, chunk 0, for rank 1 to run its forward through stage 1"
    )


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (("gpipe", 2, 2), "no pipeline schedule gpipe"),
        (("zb1p", 2, 2, 2), "one chunk a rank"),
        (("dualpipe", 3, 6), "even number"),
        (("dualpipe", 4, 6), "at least two for each rank"),
    ],
)
def test_shapes_that_are_not_are_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        ScheduleShape(*shape)
