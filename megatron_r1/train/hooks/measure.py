"""Something measured now and then, such as accuracy on held-out data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from megatron_r1.train.hooks import Hook
from megatron_r1.train.state import TrainState


class MeasureHook(Hook):
    """Adds what is measured to the row of every so many steps and of the last one. Collective: every rank has one."""

    def __init__(self, measure: Callable[[], Mapping[str, Any]], interval: int, steps: int):
        """
        Args:
            measure: the same on every rank.
            interval: steps between measurements.
            steps: of the run.
        """
        self._measure, self._interval, self._steps = measure, interval, steps

    def after_step(self, state: TrainState, row: dict[str, Any]) -> None:
        if state.step % self._interval == 0 or state.step == self._steps:
            row.update(self._measure())
