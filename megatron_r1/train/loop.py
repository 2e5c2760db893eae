"""The training loop. Everything that is not the step itself is a hook."""

from __future__ import annotations

from typing import Any, Protocol

from megatron_r1.errors import UserError
from megatron_r1.parallel import comm
from megatron_r1.train.hooks import Hook
from megatron_r1.train.state import TrainState


class CannotBegin(Exception):
    """A step cannot begin, and every rank knows it: weights and state are as the last step left them."""

    def __init__(self, reason: UserError):
        super().__init__(str(reason))
        self.reason = reason


class Step(Protocol):
    """One step of training: takes the state, gives the next one and the step's metrics."""

    def __call__(self, state: TrainState) -> tuple[TrainState, dict[str, Any]]: ...


def train(state: TrainState, step: Step, hooks: Hook, steps: int) -> TrainState:
    """Run `step` until `steps` are done or a hook asks to stop; all ranks stop at the same step.

    Args:
        state: where the run stands.
        step: advances the state by one.
        hooks: what happens around the steps.
        steps: total steps of the run, those before a resume included.

    Raises:
        UserError: why a step could not begin; what was done before is saved first.
    """
    while state.step < steps:
        try:
            state, row = step(state)
        except CannotBegin as obstacle:
            hooks.finish(state)
            raise obstacle.reason from obstacle
        hooks.after_step(state, row)
        if comm.any_rank(hooks.stop_requested()):
            break
    hooks.finish(state)
    return state
