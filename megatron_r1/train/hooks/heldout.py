"""The loss on held-out data, measured now and then."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from megatron_r1.train.hooks import Hook
from megatron_r1.train.state import TrainState

LARGEST_EXPONENT = 700.0
"""Above, an exponential is no number any more."""


class HeldoutHook(Hook):
    """Adds what is measured to the row of every so many steps and of the last, and `eval/loss_before` to the first.

    `eval/loss` is the mean in nats per token, `eval/perplexity` its exponential. Collective: every rank has one.
    """

    def __init__(self, measure: Callable[[], float], interval: int, steps: int, start: int):
        """
        Args:
            measure: the loss, the same on every rank.
            interval: steps between measurements.
            steps: of the run; start: steps already done.
        """
        self._measure, self._interval, self._steps = measure, interval, steps
        self._before = measure() if start == 0 else None

    def after_step(self, state: TrainState, row: dict[str, Any]) -> None:
        if self._before is not None:
            row["eval/loss_before"], self._before = self._before, None
        if state.step % self._interval == 0 or state.step == self._steps:
            row["eval/loss"] = loss = self._measure()
            row["eval/perplexity"] = math.exp(loss) if loss < LARGEST_EXPONENT else math.inf
