"""Trained reward models during rollouts: all ranks score together, in the trainer's thread.

A reward model is sharded over the ranks as the policy is, so all of them compute each of its scores together. Two
threads of a rank could not agree with another rank's about who uses the process groups next, so only the trainer's
thread scores. But rollouts are scored where they are generated: on rank 0, and with rollout.max_staleness in threads
beside the trainer's. Therefore

| who | while the next rollout is generated |
|---|---|
| rank 0, trainer's thread | scores its own requests at once; while it waits for a rollout, those of other threads |
| rank 0, other threads | wait for their scores |
| other ranks | score what rank 0 broadcasts, until it broadcasts the rollout, or why there is none |

Any other failure while scoring ends the run, like a failure in the middle of an update: ranks may have failed alone, so
rank 0 broadcasts nothing more. Threads that wait for scores then, or when the run ends, get an error.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

from megatron_r1.errors import NoRolloutCapacity
from megatron_r1.parallel import comm
from megatron_r1.parallel.phases import phase
from megatron_r1.rewards.reward import Reward, RewardPrompt, Value
from megatron_r1.rewards.score import Weighted

ENDS = "the run ends: nothing is scored any more"


class RewardService(Protocol):
    """The reward models of a run."""

    @property
    def rewards(self) -> Sequence[Weighted]:
        """On rank 0: the models as rewards, which any thread may call."""
        ...

    def wait[Found](self, future: Future[Found]) -> Found:
        """On rank 0, in the trainer's thread: another thread's result; meanwhile requests for scores are served."""
        ...

    def serve(self) -> Any:
        """On the other ranks: take part in scoring until rank 0 broadcasts something else, which is returned."""
        ...

    def close(self) -> None:
        """On rank 0: threads that wait for scores, now or later, get an error."""
        ...


class NoRewardModels:
    """The service of a run without trained reward models."""

    rewards: Sequence[Weighted] = ()

    def wait[Found](self, future: Future[Found]) -> Found:
        return future.result()

    def serve(self) -> Any:
        return comm.receive_broadcast()

    def close(self) -> None:
        pass


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """Responses that all ranks are to score."""

    model: int
    """Index of the reward model."""
    prompts: list[RewardPrompt]
    texts: list[str]


class CollectiveRewardService:
    """Serves rewards that are collective over all ranks to any thread of rank 0.

    It belongs to the thread that creates it, which is the trainer's.
    """

    def __init__(self, models: Sequence[Weighted]):
        """
        Args:
            models: the same on every rank; each is collective over all of them.
        """
        self._models: list[Reward] = [model.reward for model in models]
        self.rewards: Sequence[Weighted] = [
            Weighted(model.weight, RemoteReward(model.reward.name, index, self)) for index, model in enumerate(models)
        ]
        self._trainer = threading.get_ident()
        self._changed = threading.Condition()
        self._waiting: deque[tuple[ScoreRequest, Future[list[Value]]]] = deque()
        self._closed = False

    def score(self, request: ScoreRequest) -> list[Value]:
        """On rank 0, from any thread: the values. Threads beside the trainer's wait until they are served.

        Raises:
            NoRolloutCapacity: the run ends.
        """
        if threading.get_ident() == self._trainer:
            return self._on_all_ranks(request)
        values: Future[list[Value]] = Future()
        with self._changed:
            if self._closed:
                raise NoRolloutCapacity(ENDS)
            self._waiting.append((request, values))
            self._changed.notify()
        return values.result()

    def wait[Found](self, future: Future[Found]) -> Found:
        """As of `RewardService`.

        Waiting requests are served even when the result is there, so that rollouts of later steps can continue while
        the trainer trains on this one.
        """
        future.add_done_callback(self._wake)
        while waiting := self._next(future):
            request, values = waiting
            try:
                found = self._on_all_ranks(request)
            except BaseException as error:
                values.set_exception(error)
                raise
            values.set_result(found)
        return future.result()

    def serve(self) -> Any:
        while isinstance(received := comm.receive_broadcast(), ScoreRequest):
            self._compute(received)
        return received

    def close(self) -> None:
        with self._changed:
            self._closed = True
            waiting, self._waiting = self._waiting, deque()
        for _, values in waiting:
            values.set_exception(NoRolloutCapacity(ENDS))

    def _next(self, future: Future[Any]) -> tuple[ScoreRequest, Future[list[Value]]] | None:
        """The next request; None when the result is there and no request waits."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or future.done())
            return self._waiting.popleft() if self._waiting else None

    def _wake(self, _: Future[Any]) -> None:
        with self._changed:
            self._changed.notify()

    def _on_all_ranks(self, request: ScoreRequest) -> list[Value]:
        comm.broadcast(request)
        return self._compute(request)

    def _compute(self, request: ScoreRequest) -> list[Value]:
        with phase("rewards"):
            return list(self._models[request.model].score(request.prompts, request.texts))


@dataclass(frozen=True, slots=True)
class RemoteReward:
    """One of the models as a `Reward`, on rank 0."""

    name: str
    index: int
    service: CollectiveRewardService

    def score(self, prompts: Sequence[RewardPrompt], texts: Sequence[str]) -> list[Value]:
        return self.service.score(ScoreRequest(self.index, list(prompts), list(texts)))
