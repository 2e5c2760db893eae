"""What happens around the steps of a run, each concern a hook of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_r1.train.state import TrainState


class Hook:
    """Does nothing; a concern overrides what it needs."""

    def after_step(self, state: TrainState, row: dict[str, Any]) -> None:
        """A step is done; `row` holds its metrics and may be added to by earlier hooks."""

    def stop_requested(self) -> bool:
        """Whether the run should end after this step; any rank's wish counts."""
        return False

    def finish(self, state: TrainState) -> None:
        """The loop is over, by its last step or by a stop."""


class Hooks(Hook):
    """Several hooks as one, in order."""

    def __init__(self, hooks: Sequence[Hook]):
        self._hooks = hooks

    def after_step(self, state: TrainState, row: dict[str, Any]) -> None:
        for hook in self._hooks:
            hook.after_step(state, row)

    def stop_requested(self) -> bool:
        return any(hook.stop_requested() for hook in self._hooks)

    def finish(self, state: TrainState) -> None:
        for hook in self._hooks:
            hook.finish(state)
