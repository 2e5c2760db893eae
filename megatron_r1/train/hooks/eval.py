"""Evaluation during training, such as accuracy or loss on validation data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from megatron_r1.parallel.phases import phase
from megatron_r1.train.hooks import Hook
from megatron_r1.train.state import TrainState


class EvalHook(Hook):
    """Adds evaluation metrics to the row every `interval` steps and after the last. Collective: every rank has one."""

    def __init__(
        self,
        measure: Callable[[], Mapping[str, Any]],
        interval: int,
        steps: int,
        before: Mapping[str, Any] | None = None,
    ):
        """
        Args:
            measure: the same on every rank.
            interval: steps between measurements.
            steps: of the run.
            before: metrics measured before the first step, which go into the first row.
        """
        self._measure, self._interval, self._steps = measure, interval, steps
        self._before = before or {}

    def after_step(self, state: TrainState, row: dict[str, Any]) -> None:
        row |= self._before
        self._before = {}
        if state.step % self._interval == 0 or state.step == self._steps:
            with phase("evaluation"):
                row |= self._measure()
