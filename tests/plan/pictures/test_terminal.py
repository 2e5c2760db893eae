"""A pipeline in the terminal: a line for each rank, blocks in proportion to time, and what they mean."""

from __future__ import annotations

from rich.console import Console

from megatron_r1.plan.pictures.terminal import terminal_pipeline
from megatron_r1.plan.pipeline.orders import ScheduleShape, build_schedule
from megatron_r1.plan.pipeline.simulate import Durations, simulate


def printed(shape: ScheduleShape, width: int) -> list[str]:
    timeline = simulate(build_schedule(shape), Durations.equal(shape.pipeline, 1.0, 1.0, 1.0))
    console = Console(width=200, force_terminal=False)
    with console.capture() as capture:
        console.print(terminal_pipeline(timeline, width))
    return capture.get().splitlines()


def test_a_block_is_as_wide_as_its_pass_is_long():
    """9 seconds in 36 characters: a forward pass has 4 of them, a backward pass 8."""
    assert printed(ScheduleShape("1f1b", 2, 2), 36) == [
        "1f1b: 9 s, 33.3% idle",
        "rank 0   F0  F1  ········B0      ····B1        67% busy",
        "rank 1   ····F0  B0      F1  B1      ········  67% busy",
        "         0        2.25 s   4.5 s    6.75 s   9 s",
        "         F forward   B backward   · idle",
    ]


def test_passes_that_overlap_are_one_block():
    lines = printed(ScheduleShape("dualpipe", 2, 6), 66)
    assert lines[1] == "rank 0   F0  F3 F1  B3     F4B0       F2B4       F5B1       B5      I2 W2   100% busy"
    assert "I backward: gradients of inputs" in lines[-1] and "FB forward and backward pass overlapped" in lines[-1]


def test_a_block_too_narrow_for_its_number_has_its_letter():
    assert printed(ScheduleShape("1f1b", 2, 12), 39)[1] == "rank 0   FF··B0FB1FB2FB3FB4FB5FB6FB7FB8FB9FB ·B   92% busy"
