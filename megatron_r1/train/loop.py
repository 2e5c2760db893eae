"""The training loop. Everything beside the step itself is a hook."""

from __future__ import annotations

from typing import Any, Protocol

from megatron_r1.errors import UserError
from megatron_r1.parallel import comm
from megatron_r1.parallel.phases import begin_step, end_steps
from megatron_r1.train.hooks import Hook
from megatron_r1.train.state import TrainState


class StepUnavailable(Exception):
    """Raised on every rank when a step cannot start; weights and state are still those of the last step."""

    def __init__(self, error: UserError):
        super().__init__(str(error))
        self.error = error


class Step(Protocol):
    """One step of training: from the state to the next state and the step's metrics."""

    def __call__(self, state: TrainState) -> tuple[TrainState, dict[str, Any]]: ...


def train(state: TrainState, step: Step, hooks: Hook, steps: int) -> TrainState:
    """Run `step` until `steps` are done or a hook asks to stop; all ranks stop at the same step.

    Args:
        state: state before the first step.
        step: advances the state by one step.
        hooks: called around the steps.
        steps: total steps of the run, those before a resume included.

    Raises:
        UserError: a step could not start; the state is saved before this is raised.
    """
    while state.step < steps:
        begin_step(state.step + 1)
        hooks.before_step(state)
        try:
            state, row = step(state)
        except StepUnavailable as unavailable:
            hooks.finish(state)
            raise unavailable.error from unavailable
        hooks.after_step(state, row)
        if comm.any_rank(hooks.stop_requested()):
            break
    end_steps()
    hooks.finish(state)
    return state
