"""Keep the exponential moving average of the weights up to date."""

from __future__ import annotations

from typing import Any

from megatron_r1.train.ema import MovingAverage
from megatron_r1.train.hooks import Hook
from megatron_r1.train.state import TrainState


class EmaHook(Hook):
    """Takes every step's weights into the average; it must come before the hook that saves it."""

    def __init__(self, average: MovingAverage):
        self._average = average

    def after_step(self, state: TrainState, row: dict[str, Any]) -> None:
        self._average.update()

    def finish(self, state: TrainState) -> None:
        self._average.close()
