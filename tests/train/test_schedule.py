"""Learning rates against the formulas, and skipped updates in a row."""

from __future__ import annotations

import math

import pytest

from megatron_r1.config.train import ScheduleConfig
from megatron_r1.errors import Diverged
from megatron_r1.train.guard import count_skips
from megatron_r1.train.schedule import learning_rate


def schedule(decay: str, warmup: int = 10) -> ScheduleConfig:
    return ScheduleConfig(learning_rate=2e-3, final_learning_rate=2e-4, warmup_steps=warmup, decay=decay)


@pytest.mark.parametrize("decay", ["constant", "linear", "cosine"])
def test_warm_up_is_linear_from_zero(decay):
    rates = [learning_rate(schedule(decay), step, 110) for step in range(1, 11)]
    assert rates == pytest.approx([2e-3 * step / 10 for step in range(1, 11)], rel=1e-12)


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        ("constant", [2e-3, 2e-3, 2e-3]),
        ("linear", [1.55e-3, 1.1e-3, 2e-4]),
        ("cosine", [2e-4 + 9e-4 * (1 + math.sqrt(0.5)), 1.1e-3, 2e-4]),
    ],
)
def test_decay_at_a_quarter_a_half_and_the_end(decay, expected):
    rates = [learning_rate(schedule(decay), step, 110) for step in (35, 60, 110)]
    assert rates == pytest.approx(expected, rel=1e-12)


def test_without_warm_up_the_first_step_is_near_the_peak_and_late_steps_stay_final():
    assert learning_rate(schedule("linear", 0), 1, 100) == pytest.approx(2e-3 - 1.8e-3 / 100)
    assert learning_rate(schedule("cosine", 0), 101, 100) == pytest.approx(2e-4)


def test_skips_in_a_row_are_counted_until_a_finite_update():
    assert count_skips(2, True, 3, step=7) == 3
    assert count_skips(3, False, 3, step=8) == 0
    with pytest.raises(Diverged, match="step 9.*4 updates in a row.*max_skipped_steps=3"):
        count_skips(3, True, 3, step=9)
    with pytest.raises(Diverged):
        count_skips(0, True, 0, step=1)
