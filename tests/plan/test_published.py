"""The time model against published steps."""

from __future__ import annotations

import pytest

from megatron_r1.plan.constants import UNCERTAINTY, Constants
from megatron_r1.plan.published import ROWS, Row
from megatron_r1.plan.step import count, step_time

FITTED = [row for row in ROWS if row.fit]


def error(row: Row) -> float:
    return step_time(count(row.job()), Constants()).total / row.seconds - 1


def test_published_steps_are_within_the_stated_uncertainty() -> None:
    errors = {f"{row.gpu} {row.name}": error(row) for row in FITTED}
    print({name: f"{one:+.1%}" for name, one in errors.items()})
    assert len(errors) > 40 and all(abs(one) <= UNCERTAINTY for one in errors.values())


def test_deepseeks_own_step_is_within_a_tenth() -> None:
    own = ROWS[0]
    time = step_time(count(own.job()), Constants())
    assert own.seconds == 19.926 and time.total == pytest.approx(19.926, rel=0.1)
    # Table 4 of arXiv 2505.09343: bubble 2.06 s, optimizer 0.29 s.
    assert time.bubble == pytest.approx(2.06, rel=0.3) and time.gradients + time.optimizer < 0.6


def test_strong_scaling_of_mlperf_is_within_a_fifth_at_every_point() -> None:
    scaling = [row for row in ROWS if "MLPerf," in row.name]
    assert [row.gpus for row in scaling] == [512, 2048, 4096, 8192]
    assert all(abs(error(row)) < 0.2 for row in scaling)


def test_rows_that_are_not_fitted_say_what_is_missing() -> None:
    assert all(bool(row.missing) is not row.fit for row in ROWS)
