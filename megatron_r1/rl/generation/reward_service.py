"""Reward models beside rollouts: all ranks score together, in the trainer's thread.

A reward model is shared out over the ranks as the policy is, so each of its scores is computed by all of them at the
same time; and two threads of a rank could not agree with those of another about whose turn it is with the process
groups, so only the trainer's thread scores. Answers however are scored where rollouts are taken: on rank 0, and with
rollout.max_staleness in threads beside the trainer's. Therefore

| who | while the next rollout is taken |
|---|---|
| rank 0, trainer's thread | scores what it asks for itself at once; while it waits, what other threads ask for |
| rank 0, other threads | wait for their scores |
| other ranks | score what rank 0 tells them to, until it tells them the rollout, or why there is none |

Whatever else goes wrong while scoring ends the run like a failure in the middle of learning: ranks may have failed
alone, so nothing more is said to them. Threads that wait for scores then, or when the run ends, are told that no scores
will come.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from megatron_r1.errors import NoRolloutCapacity
from megatron_r1.parallel import comm
from megatron_r1.rewards.reward import Reward, RewardPrompt, Value
from megatron_r1.rewards.score import Weighted

ENDS = "the run ends: nothing is scored any more"


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """What all ranks are to score."""

    model: int
    """Place of the reward among those that there are."""
    prompts: list[RewardPrompt]
    texts: list[str]


class CollectiveRewardService:
    """Lets rewards that are collective over all ranks be asked by any thread of rank 0.

    It belongs to the thread that makes it, which is the trainer's.
    """

    def __init__(self, models: Sequence[Weighted]):
        """
        Args:
            models: the same on every rank; each is collective over all of them.
        """
        self._models: list[Reward] = [model.reward for model in models]
        self.rewards = [
            Weighted(model.weight, RemoteReward(model.reward.name, place, self)) for place, model in enumerate(models)
        ]
        """What to ask on rank 0 in place of the models."""
        self._trainer = threading.get_ident()
        self._changed = threading.Condition()
        self._waiting: deque[tuple[ScoreRequest, Future[list[Value]]]] = deque()
        self._closed = False

    def score(self, wanted: ScoreRequest) -> list[Value]:
        """On rank 0: the values, from any thread; a thread beside the trainer's waits until it is served.

        Raises:
            NoRolloutCapacity: the run ends.
        """
        if threading.get_ident() == self._trainer:
            return self._on_all_ranks(wanted)
        values: Future[list[Value]] = Future()
        with self._changed:
            if self._closed:
                raise NoRolloutCapacity(ENDS)
            self._waiting.append((wanted, values))
            self._changed.notify()
        return values.result()

    def result[Found](self, future: Future[Found]) -> Found:
        """On rank 0, in the trainer's thread: what another thread finds; until then, who asks for scores is served.

        What is asked for before is scored even when the result is there: rollouts of later steps can then go on while
        the trainer learns from it.
        """
        future.add_done_callback(self._wake)
        while asked := self._next(future):
            wanted, values = asked
            try:
                found = self._on_all_ranks(wanted)
            except BaseException as error:
                values.set_exception(error)
                raise
            values.set_result(found)
        return future.result()

    def received(self) -> Any:
        """On the other ranks: what rank 0 broadcasts, once all is scored that it wants scored before."""
        while isinstance(told := comm.receive_broadcast(), ScoreRequest):
            self._compute(told)
        return told

    def close(self) -> None:
        """On rank 0: there are no scores any more for threads that wait for some, now or later."""
        with self._changed:
            self._closed = True
            waiting, self._waiting = self._waiting, deque()
        for _, values in waiting:
            values.set_exception(NoRolloutCapacity(ENDS))

    def _next(self, future: Future[Any]) -> tuple[ScoreRequest, Future[list[Value]]] | None:
        """The next to be served; None when the result is there, and nobody waits."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or future.done())
            return self._waiting.popleft() if self._waiting else None

    def _wake(self, _: Future[Any]) -> None:
        with self._changed:
            self._changed.notify()

    def _on_all_ranks(self, wanted: ScoreRequest) -> list[Value]:
        comm.broadcast(wanted)
        return self._compute(wanted)

    def _compute(self, wanted: ScoreRequest) -> list[Value]:
        return self._models[wanted.model].score(wanted.prompts, wanted.texts)


@dataclass(frozen=True, slots=True)
class RemoteReward:
    """One of the models as a `Reward`, on rank 0."""

    name: str
    place: int
    joint: CollectiveRewardService

    def score(self, prompts: Sequence[RewardPrompt], texts: Sequence[str]) -> list[Value]:
        return self.joint.score(ScoreRequest(self.place, list(prompts), list(texts)))
