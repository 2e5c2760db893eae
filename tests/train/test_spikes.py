"""Spikes of loss and gradient norm are reported, once each, and hardly anything else is."""

from __future__ import annotations

import random
from typing import Any

import pytest

from megatron_r1.train.hooks.spikes import FEWEST, SpikeHook
from megatron_r1.train.state import TrainState


def normal_rows(number: int, chance: random.Random) -> list[dict[str, Any]]:
    """Rows whose loss falls slowly, with noise of standard deviation 0.05."""
    return [
        {"train/loss": 3.0 + 2.0 * 0.999**step + chance.gauss(0, 0.05), "train/gradient_norm": chance.gauss(1.0, 0.1)}
        for step in range(number)
    ]


def spikes(hook: SpikeHook, rows: list[dict[str, Any]]) -> list[int]:
    for step, row in enumerate(rows):
        hook.after_step(TrainState(step=step), row)
    return [step for step, row in enumerate(rows) if row["train/spikes"]]


def test_every_spike_of_eight_sigmas_is_found_and_hardly_anything_else():
    rows = normal_rows(10_000, random.Random(0))
    planted = list(range(200, 10_000, 197))
    for step in planted:
        rows[step]["train/gradient_norm"] = 1.0 + 8 * 0.1 * 1.3
    found = spikes(SpikeHook(6.0), rows)
    assert set(planted) <= set(found) and len(found) - len(planted) <= 1


def test_a_spike_is_named_with_the_median(caplog):
    rows = normal_rows(100, random.Random(1))
    rows[90]["train/loss"] = 9.0
    assert spikes(SpikeHook(6.0), rows) == [90]
    (message,) = caplog.messages
    assert message.startswith("step 90: train/loss is 9, and the median of the last 90 steps ")


def test_without_enough_steps_or_change_nothing_is_a_spike():
    few = [{"train/loss": 1.0} for _ in range(FEWEST - 1)] + [{"train/loss": 100.0}]
    assert spikes(SpikeHook(6.0), few) == []
    steady = [{"train/loss": 1.0} for _ in range(100)] + [{"train/loss": 1.001}, {"train/loss": 1.2}]
    assert spikes(SpikeHook(6.0), steady) == [101]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_skipped_step_is_no_spike_and_moves_nothing(value):
    hook = SpikeHook(6.0)
    rows = [{"train/gradient_norm": 1.0} for _ in range(50)]
    rows += [{"train/gradient_norm": value} for _ in range(100)] + [{"train/gradient_norm": 1.0}]
    assert spikes(hook, rows) == []


def test_a_resumed_run_goes_on_with_its_window():
    rows = normal_rows(200, random.Random(2))
    rows[150]["train/loss"] = 6.5
    whole = spikes(SpikeHook(6.0), [dict(row) for row in rows])
    resumed = SpikeHook(6.0, rows[:150])
    assert whole == [150] == [150 + step for step in spikes(resumed, rows[150:])]
