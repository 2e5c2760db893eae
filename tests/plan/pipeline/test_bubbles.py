"""What ranks wait in the simulator is what the papers' closed formulas say, over a grid of sizes."""

from __future__ import annotations

import pytest

from megatron_r1.plan.pipeline.orders import ScheduleShape, build_schedule
from megatron_r1.plan.pipeline.simulate import Durations, Timeline, simulate

RANKS = (2, 4, 8, 16)
TIMES = ((3.0, 3.0, 3.0), (5.0, 4.0, 3.0), (4.0, 5.0, 3.0), (3.0, 5.0, 4.0), (4.0, 3.0, 5.0), (3.0, 3.0, 0.5))
"""Seconds of a forward pass, of the gradients of inputs, and of those of weights."""


def run(shape: ScheduleShape, times: tuple[float, float, float], saves: float = 0.0) -> Timeline:
    """Times are of a whole rank: each of its chunks takes its share."""
    stages, chunks = shape.pipeline * shape.virtual_pipeline, shape.virtual_pipeline
    forward, inputs, weights = ([seconds / chunks] * stages for seconds in times)
    return simulate(build_schedule(shape), Durations(forward, inputs, weights, overlap_saves=[saves] * stages))


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("micro_batches", [1, 3, 37])
@pytest.mark.parametrize("times", TIMES)
def test_1f1b_waits_as_published(ranks, micro_batches, times):
    """(PP - 1)(F + B) of DeepSeek-V3's table 2, with any number of micro-batches; B is the whole backward pass."""
    timeline = run(ScheduleShape("1f1b", ranks, micro_batches), times)
    assert timeline.idle == pytest.approx([(ranks - 1) * sum(times)] * ranks)
    assert timeline.seconds == pytest.approx((micro_batches + ranks - 1) * sum(times))


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("chunks", [2, 3])
@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("times", TIMES)
def test_interleaved_1f1b_waits_as_published(ranks, chunks, rounds, times):
    """(PP - 1)(F + B) / V (Narayanan et al. 2021, section 2.2.2), micro-batches being a multiple of PP."""
    timeline = run(ScheduleShape("interleaved", ranks, ranks * rounds, chunks), times)
    assert timeline.idle == pytest.approx([(ranks - 1) * sum(times) / chunks] * ranks)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("more", [0, 1, 24])
@pytest.mark.parametrize("times", TIMES)
def test_zb1p_waits_as_published(ranks, more, times):
    """(PP - 1)(F + B - 2W), with as many micro-batches as ranks at least, and W neither above F nor above B - W.

    With longer weight gradients ranks wait longer than it says.
    """
    forward, inputs, weights = times
    timeline = run(ScheduleShape("zb1p", ranks, ranks + more), times)
    published = (ranks - 1) * (forward + (inputs + weights) - 2 * weights)
    if weights <= min(forward, inputs):
        assert timeline.idle == pytest.approx([published] * ranks)
    else:
        assert min(timeline.idle) > published


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("more", [0, 14])
@pytest.mark.parametrize("weights", [0.5, 1.5, 3.0])
@pytest.mark.parametrize("saves", [0.0, 2.0])
def test_dualpipe_waits_as_published(ranks, more, weights, saves):
    """(PP/2 - 1)(F&B + B - 3W) of the two middle ranks, which have most overlapping pairs, where F = B - W >= W.

    Ranks further out overlap fewer pairs, so that they compute longer in the same time and wait less.
    """
    timeline = run(ScheduleShape("dualpipe", ranks, 2 * ranks + more), (3.0, 3.0, weights), saves)
    published = (ranks // 2 - 1) * ((6.0 + weights - saves) + (3.0 + weights) - 3 * weights)
    middle = ranks // 2
    assert timeline.idle[middle - 1] == timeline.idle[middle] == max(timeline.idle) == pytest.approx(published)
    if not saves:
        assert timeline.idle == pytest.approx([published] * ranks)


def test_dualpipe_waits_otherwise_where_forward_and_backward_passes_differ():
    """F = 4, B = 8 and W = 3 on 16 ranks: the order of the open implementation waits 73, where the formula says 77."""
    timeline = run(ScheduleShape("dualpipe", 16, 40), (4.0, 5.0, 3.0))
    assert timeline.idle == pytest.approx([73.0] * 16) and 7 * (12 + 8 - 3 * 3) == 77


def test_deepseeks_figure_5_has_its_order_of_schedules():
    """8 ranks and 20 micro-batches: DualPipe waits less than ZB1P, and that less than 1F1B."""
    shapes = [ScheduleShape(name, 8, 20) for name in ("dualpipe", "zb1p", "1f1b")]
    waits = [max(run(shape, (1.0, 1.0, 0.75)).idle) for shape in shapes]
    assert waits == sorted(waits) and len(set(waits)) == 3
