"""The fit of sampling's constants to published steps of reinforcement learning."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_r1.plan.constants import Constants
from megatron_r1.plan.published_rl import ROLLOUTS
from megatron_r1.plan.serving import ServingConstants

PROGRAM = Path(__file__).parents[2] / "tools" / "plan" / "fit_rl.py"
sys.path.insert(0, str(PROGRAM.parent))


def test_constants_are_found_again_from_steps_that_they_made():
    """Rows with servers across nodes, with large and with small batches tell the three apart."""
    from fit_rl import Measured, fitted

    true = replace(ServingConstants(), network=1.2e-4, step=2e-3, sequence=8e-5)
    rows = [row for row in ROLLOUTS if row.gpus in (8, 32, 128) and row.gpu == "H100" and not row.servers]
    measured = []
    for row in rows:
        step = row.predicted(Constants(), true)
        assert Measured(row, row.predicted(Constants())).with_rollout(true) == step
        measured.append(Measured(replace(row, seconds=step.total), step))
    assert len(measured) == 4
    found = fitted(measured, ServingConstants())
    for name in ("network", "step", "sequence"):
        assert getattr(found, name) == pytest.approx(getattr(true, name), rel=1e-3)
