"""The time model against published steps."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import pytest

from megatron_r1.plan.constants import UNCERTAINTY, Constants
from megatron_r1.plan.pipeline.orders import build_schedule
from megatron_r1.plan.pipeline.simulate import simulate
from megatron_r1.plan.pipeline_time import durations_of, schedule_of, simulated_step
from megatron_r1.plan.published import ROWS, PublishedStep
from megatron_r1.plan.step import chunk_seconds, count, pair

FITTED = [row for row in ROWS if row.fit]


def error(row: PublishedStep) -> float:
    return simulated_step(count(row.job()), Constants()).total / row.seconds - 1


def test_published_steps_are_within_the_stated_uncertainty() -> None:
    errors = {f"{row.gpu} {row.name}": error(row) for row in FITTED}
    print({name: f"{one:+.1%}" for name, one in errors.items()})
    assert len(errors) > 40 and all(abs(one) <= UNCERTAINTY for one in errors.values())


def test_deepseeks_own_step_is_within_a_tenth() -> None:
    own = ROWS[0]
    time = simulated_step(count(own.job()), Constants())
    assert own.seconds == 19.926 and time.total == pytest.approx(19.926, rel=0.1)
    assert time.gradients + time.optimizer == pytest.approx(0.29, rel=0.15)


def test_parts_of_deepseeks_step_are_near_the_published_ones() -> None:
    """Table 4 of arXiv 2505.09343: 1F1B 13.95 s, bubble 2.06 s, 1B and 1W 2.47 s, 1F 1.13 s; means over ranks."""
    counted = count(ROWS[0].job())
    timeline = simulate(build_schedule(schedule_of(counted.job)), durations_of(counted, Constants()))
    seconds: dict[str, float] = defaultdict(float)
    for event in timeline.events:  # two passes that overlap have one and the same time
        name = "1F1B" if event.paired else event.kind
        seconds[name] += (event.end - event.start) / 16 / (2 if event.paired else 1)
    found = {
        "1F1B": seconds["1F1B"],
        "bubble": sum(timeline.idle) / 16,
        "1B, 1W": sum(seconds[name] for name in seconds if name.startswith("backward")),
        "1F": seconds["forward"],
    }
    print({name: f"{one:.2f} s" for name, one in found.items()})
    assert found["1F1B"] == pytest.approx(13.95, rel=0.05)
    assert found["1B, 1W"] == pytest.approx(2.47, rel=0.1)
    assert found["1F"] == pytest.approx(1.13, rel=0.15)
    assert found["bubble"] == pytest.approx(2.06, rel=0.25)


def test_deepseeks_traced_passes_take_as_long_as_in_the_trace() -> None:
    """Forward and backward through four layers with even routing: 129 ms (deepseek-ai/profile-data, train.json)."""
    job = replace(ROWS[0].job(), imbalance=1.0)
    chunk = chunk_seconds(count(job), Constants())[5][0]
    assert sum(pair(chunk.forward, chunk.backward_input + chunk.backward_weight, job)) == pytest.approx(0.129, rel=0.02)


def test_strong_scaling_of_mlperf_is_within_a_fifth_at_every_point() -> None:
    scaling = [row for row in ROWS if "MLPerf," in row.name]
    assert [row.gpus for row in scaling] == [512, 2048, 4096, 8192]
    assert all(abs(error(row)) < 0.2 for row in scaling)


def test_rows_that_are_not_fitted_say_what_is_missing() -> None:
    assert all(bool(row.missing) is not row.fit for row in ROWS)
