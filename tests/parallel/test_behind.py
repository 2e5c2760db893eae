"""Which ranks the others wait for, by what each said last."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_r1.parallel.behind import ranks_behind, shown
from megatron_r1.parallel.heartbeats import Beat


def beat(**more: Any) -> Beat:
    return Beat(**{"number": 1, "host": "a", "pid": 1, "phase": "update", "step": 3, "seconds": 9.0} | more)


CASES = {
    "the one whose turn the others wait for": (
        [beat(waits=4), beat(waits=5, waiting=True), beat(waits=5, waiting=True)],
        [0],
    ),
    "the one that has begun fewer collective operations": (
        [beat(collectives={"all": 7}), beat(collectives={"all": 6}), beat(collectives={"all": 7})],
        [1],
    ),
    "a rank that waits in a collective operation is not behind for others that wait for it in another group": (
        [
            beat(collectives={"data": 4, "tensor 0": 9}),  # waits for rank 1 in its tensor group
            beat(collectives={"data": 4, "tensor 0": 8}),
            beat(collectives={"data": 5, "tensor 1": 9}),  # waits for rank 0 in its data group
        ],
        [1],
    ),
    "of ranks that have begun as many, the one that does not wait in one": (
        [beat(in_collective=True), beat(in_collective=False)],
        [1],
    ),
    "the place in the program decides before collective operations do": (
        [beat(waits=1, collectives={"all": 9}), beat(waits=2, waiting=True, collectives={"all": 8})],
        [0],
    ),
    "all, where they do not differ": ([beat(), beat()], [0, 1]),
}


@pytest.mark.parametrize("name", CASES)
def test_behind_is(name):
    beats, behind = CASES[name]
    assert ranks_behind(dict(enumerate(beats))) == behind


def test_ranks_are_shown_in_short():
    assert [shown([3]), shown([2, 0, 1, 7]), shown([0, 1])] == ["rank 3", "ranks 0-2, 7", "ranks 0-1"]
