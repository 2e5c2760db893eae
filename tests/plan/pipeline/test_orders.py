"""The order of passes: every micro-batch once through every chunk, and no more in flight than the memory model says."""

from __future__ import annotations

from collections import Counter
from itertools import product
from operator import mul

import pytest

from megatron_r1.config.parallel import ParallelConfig
from megatron_r1.config.pipeline_stages import fitting_group_size
from megatron_r1.memory.passes import passes_at_peak
from megatron_r1.plan.pipeline.orders import ORDERS, ScheduleShape, build_schedule
from megatron_r1.plan.pipeline.schedule import ChunkPass, peak_passes


@pytest.mark.parametrize("name", sorted(ORDERS))
@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("more", [0, 2, 8])
def test_every_micro_batch_passes_every_chunk_forwards_and_backwards_once(name, ranks, more):
    shape = ScheduleShape(name, ranks, 2 * ranks + more, virtual_pipeline=1 + (name == "interleaved"))
    for passes in build_schedule(shape).order:
        counted = Counter((each.kind, each.micro_batch, each.chunk) for each in passes)
        assert max(counted.values()) == 1
        forward = {key[1:] for key in counted if key[0] == "forward"}
        whole = [key[1:] for key in counted if key[0] == "backward"]
        inputs = [key[1:] for key in counted if key[0] == "backward_input"]
        weights = [key[1:] for key in counted if key[0] == "backward_weight"]
        assert forward == {*whole, *inputs} and not {*whole} & {*inputs} and sorted(inputs) == sorted(weights)
        chunks = shape.virtual_pipeline if name != "dualpipe" else 1
        assert len(forward) == shape.micro_batches * chunks


def interleaved_sizes():
    """Ranks, chunks, micro-batches and group size of what megatron-core schedules."""
    for ranks, chunks, micro_batches in product((2, 4, 8), (1, 2, 4), (1, 4, 8, 13, 21, 64)):
        group = fitting_group_size(0, ranks, micro_batches) if chunks > 1 else 0
        if group is not None:
            yield ranks, chunks, micro_batches, group


@pytest.mark.parametrize(("ranks", "chunks", "micro_batches", "group"), [*interleaved_sizes()])
@pytest.mark.parametrize("overlapped", [False, True])
def test_passes_in_flight_are_those_that_memory_is_planned_for(ranks, chunks, micro_batches, group, overlapped):
    name = "interleaved" if chunks > 1 else "1f1b"
    schedule = build_schedule(ScheduleShape(name, ranks, micro_batches, chunks, group, overlapped and chunks > 1))
    parallel = ParallelConfig(pipeline=ranks, virtual_pipeline=chunks)
    for sizes in ([1.0] * chunks, [3.1, *[1.0] * (chunks - 1)], [*[1.0] * (chunks - 1), 3.1], [0.3, 1.7, 1.1, 0.9]):
        largest = [
            sum(map(mul, passes_at_peak(rank, parallel, micro_batches, sizes[:chunks], overlapped), sizes))
            for rank in range(ranks)
        ]
        counted = [sum(map(mul, passes, sizes)) for passes in peak_passes(schedule, [sizes] * ranks)]
        assert largest == pytest.approx(counted)


@pytest.mark.parametrize("ranks", [2, 4, 8, 16])
def test_zero_bubble_and_dualpipe_keep_what_is_published(ranks):
    """Activations of PP micro-batches with ZB1P, on every rank, and of PP + 1 with DualPipe (DeepSeek-V3, table 2)."""
    assert peak_passes(build_schedule(ScheduleShape("zb1p", ranks, 3 * ranks))) == [[ranks]] * ranks
    both = build_schedule(ScheduleShape("dualpipe", ranks, 3 * ranks))
    assert [sum(chunks) for chunks in peak_passes(both)] == [ranks + 1] * ranks


def test_the_peak_is_where_the_most_bytes_are_kept():
    """Rank 0 of 2 with two chunks: 3 and 2 micro-batches after the warm-up, later 4 of the first chunk and 1."""
    schedule = build_schedule(ScheduleShape("interleaved", 2, 8, 2))
    assert peak_passes(schedule)[0] == [3, 2]
    assert peak_passes(schedule, [[3.0, 1.0]] * 2)[0] == [4, 1]


def test_zero_bubble_delays_weight_gradients_on_later_ranks():
    """4 ranks and 6 micro-batches, as figure 3 of the zero-bubble paper draws ZB-H1; I is for inputs, W for weights."""
    order = build_schedule(ScheduleShape("zb1p", 4, 6)).order
    assert words(order[0]) == "F0 F1 F2 F3 I0 W0 F4 I1 W1 F5 I2 W2 I3 W3 I4 W4 I5 W5"
    assert words(order[3]) == "F0 I0 F1 I1 F2 I2 F3 I3 W0 F4 I4 W1 F5 I5 W2 W3 W4 W5"


def test_dualpipe_has_the_order_of_deepseeks_figure_5():
    """8 ranks and 20 micro-batches; the second direction's begin at 10. `&` overlaps a pass with the next one."""
    order = build_schedule(ScheduleShape("dualpipe", 8, 20)).order
    assert words(order[0]) == (
        "F0 F1 F2 F3 F4 F5 F6 F10 I10 W10 F11 I11 W11 F12 I12 W12 F13 F7& B13 F14& B0 F8& B14 F15& B1 F9& B15 F16& B2 "
        "B16 F17& B3 B17 F18& B4 B18 F19& B5 B19 I6 W6 I7 W7 I8 W8 I9 W9"
    )
    assert words(order[3]).startswith("F0 F10 F1 F11 F2 F12 F3 F13 F4 B10 F14& B0 F5& B11")
    turned = [each._replace(micro_batch=(each.micro_batch + 10) % 20, chunk=1 - each.chunk) for each in order[7]]
    assert tuple(turned) == order[0]


def words(passes: tuple[ChunkPass, ...]) -> str:
    letters = {"forward": "F", "backward": "B", "backward_input": "I", "backward_weight": "W"}
    return " ".join(letters[each.kind] + str(each.micro_batch) + "&" * each.paired for each in passes)
