"""Asynchronous rollouts with bounded staleness: the engine samples while the trainer trains.

While the trainer trains on one rollout, the engine samples those of the next steps, at most `max_staleness` of them,
the earliest first. A rollout is started when at most `max_staleness` updates of the weights lie between the engine's
weights and the step that will train on it, so no token is ever staler than that. The trainer trains on rollouts in the
order of their prompts, so short responses do not overtake long ones. `rollout.weight_sync.pause_mode` decides about
requests that run when new weights arrive: they finish with the old weights, or continue with the new ones. In both
cases a token's log-probability is by the weights that sampled it, and the objective's ratio corrects for the
difference.

Trained reward models score in the trainer's thread alone, while it waits for a rollout. A rollout that still needs
their scores waits until the trainer has finished its step; other rollouts do not wait. No token gets staler by that,
because the start of a rollout fixes the number of updates in between.

Bounding staleness at admission is AReaL's way (Fu et al., 2025, section 5.1).
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import Protocol, Self

from megatron_r1.rl.generation.reward_service import NoRewardModels, RewardService
from megatron_r1.rl.generation.rollouts import Rollout


class RolloutSource(Protocol):
    """Provides the rollout of each step."""

    @property
    def busy_seconds(self) -> float:
        """Seconds that the engine has spent on requests so far."""
        ...

    def take(self, step: int, first_prompt: int) -> Rollout:
        """The rollout of a step, from this prompt on."""
        ...


class AsyncRollouts:
    """Takes rollouts from `source` ahead of their steps; a context manager.

    Args:
        max_staleness: rollouts beyond the current one that may be started.
        prompts_per_rollout: prompts of each rollout.
        last_step: no rollouts are started for steps after it.
        abandon: ends the engine's work for other threads.
        service: the reward models, which are served while the trainer waits.
    """

    def __init__(
        self,
        source: RolloutSource,
        max_staleness: int,
        prompts_per_rollout: int,
        last_step: int,
        abandon: Callable[[], None] = lambda: None,
        service: RewardService | None = None,
    ):
        self._source, self._max_staleness = source, max_staleness
        self._prompts_per_rollout, self._last_step = prompts_per_rollout, last_step
        self._abandon, self._service = abandon, service or NoRewardModels()
        self._threads = ThreadPoolExecutor(max_staleness + 1, thread_name_prefix="rollouts")
        self._started: dict[tuple[int, int], Future[Rollout]] = {}
        """By step and first prompt."""

    @property
    def busy_seconds(self) -> float:
        return self._source.busy_seconds

    def take(self, step: int, first_prompt: int) -> Rollout:
        """The rollout of `step`; those after it are started.

        Raises:
            NoRolloutCapacity: no server is available.
        """
        for distance in range(min(self._max_staleness, self._last_step - step) + 1):
            key = step + distance, first_prompt + distance * self._prompts_per_rollout
            if key not in self._started:
                self._started[key] = self._threads.submit(self._source.take, *key)
        rollout = self._service.wait(self._started[step, first_prompt])
        del self._started[step, first_prompt]  # not before: if this fails, `close` still has to end its thread
        return rollout

    def close(self) -> None:
        """Abandon what was started: what is not in the journal will be sampled again."""
        for future in self._started.values():
            future.cancel()
        while not all(future.done() for future in self._started.values()):
            self._abandon()
            self._service.close()
            wait(self._started.values(), timeout=0.1)
        self._threads.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()
