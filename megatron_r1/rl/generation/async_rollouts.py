"""Rollouts sampled while the trainer learns: asynchronous reinforcement learning with bounded staleness.

While a step learns from its rollout, the engine works on those of the next steps, at most `ahead` of them, the earliest
first. A rollout is begun when at most `ahead` updates of the weights lie between what the engine has then and what will
learn from it, so no token is ever staler than that; and rollouts are learned from in the order of their prompts, so
long answers are not left behind by short ones. What happens to running requests when new weights arrive is the engine's
choice (rollout.weight_sync.pause_mode): they end under the old weights, or continue under the new ones. Either way each
token's log-probability is of the weights that sampled it, and the objective's ratio corrects for the difference.

Trained reward models score in the trainer's thread alone, while it waits for a rollout. One that has been answered and
still needs their scores waits until the trainer has ended its step; others do not, and no token gets staler by it:
which updates lie between is settled when a rollout is begun.

Bounding staleness where work is admitted is AReaL's way (Fu et al., 2025, section 5.1).
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import Protocol, Self

from megatron_r1.rl.generation.rollouts import Rollout


class RolloutSource(Protocol):
    """Gives each step its rollout."""

    @property
    def busy_seconds(self) -> float:
        """Seconds that the engine has spent answering so far."""
        ...

    def take(self, step: int, first_prompt: int) -> Rollout:
        """The rollout of a step, from this prompt on."""
        ...


class AsyncRollouts:
    """Takes rollouts of `rollouts` ahead of their steps; a context manager.

    Args:
        ahead: rollouts beyond the current one that may be begun.
        prompts: prompts of each rollout.
        last_step: no rollouts are begun for steps after it.
        abandon: ends what `rollouts` is doing in other threads.
        result: how the trainer waits for what another thread takes.
    """

    def __init__(
        self,
        rollouts: RolloutSource,
        ahead: int,
        prompts: int,
        last_step: int,
        abandon: Callable[[], None] = lambda: None,
        result: Callable[[Future[Rollout]], Rollout] = Future.result,
    ):
        self._rollouts, self._ahead, self._prompts, self._last_step = rollouts, ahead, prompts, last_step
        self._abandon, self._result = abandon, result
        self._threads = ThreadPoolExecutor(ahead + 1, thread_name_prefix="rollouts")
        self._begun: dict[tuple[int, int], Future[Rollout]] = {}
        """By step and first prompt."""

    @property
    def busy_seconds(self) -> float:
        return self._rollouts.busy_seconds

    def take(self, step: int, first_prompt: int) -> Rollout:
        """The rollout of `step`; those after it are begun.

        Raises:
            NoRolloutCapacity: nobody was there to answer.
        """
        for distance in range(min(self._ahead, self._last_step - step) + 1):
            place = step + distance, first_prompt + distance * self._prompts
            if place not in self._begun:
                self._begun[place] = self._threads.submit(self._rollouts.take, *place)
        rollout = self._result(self._begun[step, first_prompt])
        del self._begun[step, first_prompt]  # not before: if this fails, its thread is still one to end
        return rollout

    def close(self) -> None:
        """Abandon what has begun: what is not in the journal will be sampled anew."""
        for future in self._begun.values():
            future.cancel()
        while not all(future.done() for future in self._begun.values()):
            self._abandon()
            wait(self._begun.values(), timeout=0.1)
        self._threads.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()
