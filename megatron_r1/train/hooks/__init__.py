"""Hooks around the steps of a run, one for each concern."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from megatron_r1.train.state import TrainState


class Hook:
    """A hook that does nothing; subclasses override what they need."""

    def before_step(self, state: TrainState) -> None:
        """Called before a step, with the state that it starts from."""

    def after_step(self, state: TrainState, row: dict[str, Any]) -> None:
        """Called after a step; `row` has its metrics, and a hook may add metrics for later hooks."""

    def stop_requested(self) -> bool:
        """Whether the run should end after this step; it ends if any rank returns True."""
        return False

    def finish(self, state: TrainState) -> None:
        """Called after the loop, which ended by its last step or by a stop."""


class Hooks(Hook):
    """Several hooks as one, in order; they finish in reverse order, each of them also after another's error.

    So a run is saved before its log ends, which may wait for a network.
    """

    def __init__(self, hooks: Sequence[Hook]):
        self._hooks = hooks

    def before_step(self, state: TrainState) -> None:
        for hook in self._hooks:
            hook.before_step(state)

    def after_step(self, state: TrainState, row: dict[str, Any]) -> None:
        for hook in self._hooks:
            hook.after_step(state, row)

    def stop_requested(self) -> bool:
        return any(hook.stop_requested() for hook in self._hooks)

    def finish(self, state: TrainState) -> None:
        with ExitStack() as finishing:
            for hook in self._hooks:
                finishing.callback(hook.finish, state)
