"""Keep the exponential moving average of the weights up to date."""

from __future__ import annotations

from typing import Any

from megatron_r1.train.ema import MovingAverage
from megatron_r1.train.hooks import Hook
from megatron_r1.train.state import TrainState


class EmaHook(Hook):
    """Adds every step's weights to the average; it must precede the hook that saves the average."""

    def __init__(self, average: MovingAverage):
        self._average = average

    def after_step(self, state: TrainState, row: dict[str, Any]) -> None:
        self._average.update()

    def finish(self, state: TrainState) -> None:
        self._average.close()
