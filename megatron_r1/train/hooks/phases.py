"""Seconds of each phase of a step, as metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_r1.parallel.phases import take_seconds
from megatron_r1.track.metrics import PHASE_SECONDS
from megatron_r1.train.hooks import Hook
from megatron_r1.train.state import TrainState


class PhaseHook(Hook):
    """Adds this rank's seconds in each phase since the row before: a save comes after its step's row, so it is in the
    next one, and the first row has the start."""

    def after_step(self, state: TrainState, row: dict[str, Any]) -> None:
        row |= {f"perf/phase_seconds/{phase}": seconds for phase, seconds in take_seconds().items()}


def phase_seconds(row: Mapping[str, Any]) -> dict[str, float]:
    """The seconds in a row, by phase."""
    return {name.removeprefix(PHASE_SECONDS): value for name, value in row.items() if name.startswith(PHASE_SECONDS)}
