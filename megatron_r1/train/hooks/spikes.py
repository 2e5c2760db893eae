"""Reports spikes of the loss and of the gradient's norm, against a running median."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Iterable, Mapping
from statistics import median
from typing import Any

from megatron_r1.train.hooks import Hook
from megatron_r1.train.state import TrainState

logger = logging.getLogger(__name__)

WATCHED = ("train/loss", "train/gradient_norm")
COUNT = "train/spikes"
WINDOW, FEWEST = 128, 32
"""Steps of the running median, and steps before which nothing counts as a spike."""
SIGMA = 1.4826
"""Standard deviation of normal numbers over their median absolute deviation."""
SMALLEST = 0.01
"""Smallest deviation, as a share of the median: numbers that hardly change have no spikes within it."""


class SpikeHook(Hook):
    """Adds the number of spikes to each row, and logs them; on rank 0.

    A spike enters the window like other values: half of the window would have to be spikes to move its median there.
    """

    def __init__(self, sigmas: float, earlier: Iterable[Mapping[str, Any]] = ()):
        """
        Args:
            sigmas: standard deviations above the median from which a value is a spike.
            earlier: rows of the run before a resume, so that it goes on as if it had not stopped.
        """
        self._sigmas = sigmas
        self._values = {name: deque[float](maxlen=WINDOW) for name in WATCHED}
        for row in earlier:
            self._note(row)

    def after_step(self, state: TrainState, row: dict[str, Any]) -> None:
        found = [name for name in WATCHED if self.is_spike(name, row.get(name, math.nan))]
        for name in found:
            text = "step %d: %s is %.4g, and the median of the last %d steps %.4g"
            values = self._values[name]
            logger.warning(text, state.step, name, row[name], len(values), median(values))
        self._note(row)
        row[COUNT] = len(found)

    def is_spike(self, name: str, value: float) -> bool:
        """Whether a value is so far above the earlier ones; False as long as there are too few."""
        values = self._values[name]
        if len(values) < FEWEST or not math.isfinite(value):
            return False
        middle = median(values)
        deviation = SIGMA * median(abs(earlier - middle) for earlier in values)
        return value - middle > self._sigmas * max(deviation, SMALLEST * abs(middle))

    def _note(self, row: Mapping[str, Any]) -> None:
        for name in WATCHED:
            if math.isfinite(value := row.get(name, math.nan)):
                self._values[name].append(value)
