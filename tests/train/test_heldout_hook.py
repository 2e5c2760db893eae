"""What is measured on held-out data, and in which rows it stands."""

from __future__ import annotations

import math

import pytest

from megatron_r1.train.hooks.heldout import HeldoutHook
from megatron_r1.train.state import TrainState


def rows_of(losses: list[float], start: int, steps: int) -> list[dict]:
    waiting = iter(losses)
    hook = HeldoutHook(lambda: next(waiting), 2, steps, start)
    rows: list[dict] = [{} for _ in range(start, steps)]
    for step, row in enumerate(rows, start + 1):
        hook.after_step(TrainState(step=step), row)
    assert next(waiting, None) is None  # measured no more often than it is told
    return rows


def test_every_so_many_steps_and_at_both_ends():
    rows = rows_of([3.0, 2.0, 1.0, 0.5], 0, 5)
    assert [row.get("eval/loss") for row in rows] == [None, 2.0, None, 1.0, 0.5]
    assert [row.get("eval/loss_before") for row in rows] == [3.0, None, None, None, None]
    assert [*rows_of([1.0, 0.5], 3, 5)[0]] == ["eval/loss", "eval/perplexity"]


def test_perplexity_stands_beside_the_loss():
    rows = rows_of([9.0, 2.0, 1000.0], 0, 4)
    assert rows[1]["eval/perplexity"] == pytest.approx(7.389056098930650)
    assert rows[3]["eval/perplexity"] == math.inf and "eval/perplexity" not in rows[0]
