"""What trainer and engine disagree on: numbers by hand, parts that add up, and lines of warning."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_r1.config.rl import MismatchConfig
from megatron_r1.rl.mismatch import KEYS, alarms, mismatch_sums, summary

TRAINER = torch.tensor([[-1.0, -2.0, torch.nan], [-0.5, torch.nan, torch.nan]], dtype=torch.float64)
ROLLOUT = torch.tensor([[-1.1, -1.0, 9.0], [-0.5, 9.0, 9.0]], dtype=torch.float64)
MASK = torch.tensor([[True, True, False], [True, False, False]])


def floats(sums: dict[str, torch.Tensor]) -> dict[str, float]:
    return {key: float(value) for key, value in sums.items()}


def test_numbers_by_hand_and_parts_that_add_up():
    row = summary([floats(mismatch_sums(TRAINER, ROLLOUT, MASK, 0.5, 2.0))])
    # Differences trainer - engine: 0.1, -1, 0; weights e^0.1 and 1 are inside of 0.5..2, e^-1 is not.
    assert row == pytest.approx(
        {
            "mismatch/logprob_max_abs": 1.0,
            "mismatch/k1": (-0.1 + 1.0) / 3,
            "mismatch/k3": (math.exp(0.1) - 1.1 + math.exp(-1.0)) / 3,
            "mismatch/outside_range": 1 / 3,
        }
    )
    parts = [floats(mismatch_sums(TRAINER[i : i + 1], ROLLOUT[i : i + 1], MASK[i : i + 1], 0.5, 2.0)) for i in (0, 1)]
    assert summary(parts) == pytest.approx(row) and parts[0].keys() == {*KEYS}
    nothing = floats(mismatch_sums(TRAINER, ROLLOUT, torch.zeros_like(MASK), 0.5, 2.0))
    assert set(summary([nothing]).values()) == {0.0}


def test_a_warning_for_each_threshold_that_is_crossed():
    row = {"mismatch/logprob_max_abs": 1.0, "mismatch/k1": 0.1, "mismatch/k3": 0.2, "mismatch/outside_range": 0.3}
    assert alarms(row, MismatchConfig(k3_warn=0.2, outside_range_warn=0.3)) == []
    assert alarms(row, MismatchConfig(k3_warn=0.0, outside_range_warn=0.0)) == []
    lines = alarms(row, MismatchConfig(logprob_max_abs_warn=0.5, k3_warn=0.1, outside_range_warn=0.2))
    assert [line.partition("=")[0] for line in lines] == [
        "mismatch/logprob_max_abs",
        "mismatch/k3",
        "mismatch/outside_range",
    ]
    assert lines[1].startswith("mismatch/k3=0.2 is above rl.mismatch.k3_warn=0.1")


def test_what_is_not_a_number_is_noticed_wherever_it_stands():
    good = {
        "mismatch/logprob_max_abs": 0.1,
        "mismatch/k1": 0.0,
        "mismatch/k3": 0.0,
        "mismatch/outside_range": 0.0,
        "mismatch/tokens": 2.0,
    }
    row = summary([good, good | {"mismatch/logprob_max_abs": math.nan, "mismatch/k3": math.nan}, good])
    assert math.isnan(row["mismatch/logprob_max_abs"]) and math.isnan(row["mismatch/k3"])
    assert len(alarms(row, MismatchConfig(logprob_max_abs_warn=0.5))) == 2
