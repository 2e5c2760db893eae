"""Rollouts sampled while the trainer learns: one step off-policy.

While a step learns from its rollout, the engine samples the next one with the weights that it has, which are those from
before the step. So every token is sampled by weights one step old, its log-probability at that time travels with it,
and the objective's ratio corrects for the difference. Weights are sent when both are done.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Protocol, Self

from megatron_r1.rl.rollouts import Rollout


class TakesRollouts(Protocol):
    """Gives each step its rollout."""

    def take(self, step: int, first_prompt: int) -> Rollout:
        """The rollout of a step, from this prompt on."""
        ...


class AheadRollouts:
    """Takes rollouts of `rollouts` one step ahead, up to the last step; a context manager."""

    def __init__(self, rollouts: TakesRollouts, last_step: int):
        self._rollouts, self._last_step = rollouts, last_step
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rollouts")
        self._next: tuple[int, int, Future[Rollout]] | None = None

    def take(self, step: int, first_prompt: int) -> Rollout:
        """The rollout of `step`; the one after it is begun, with the weights that the engine has now.

        Raises:
            NoRolloutCapacity: nobody was there to answer.
        """
        waiting, self._next = self._next, None
        # Prompts depend on how many the step before has used up, which is known when its rollout is.
        if waiting and waiting[:2] == (step, first_prompt):
            rollout = waiting[2].result()
        else:
            rollout = self._rollouts.take(step, first_prompt)
        if step < self._last_step:
            after = step + 1, first_prompt + rollout.prompts
            self._next = (*after, self._thread.submit(self._rollouts.take, *after))
        return rollout

    def close(self) -> None:
        """Wait for what has begun and forget it: it is in the journal, or will be sampled anew."""
        self._thread.shutdown(cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()
