"""The loop of reinforcement learning: send the weights, take a rollout, learn from it, and again."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch.distributed as dist

from megatron_r1.errors import NoRolloutCapacity
from megatron_r1.parallel import comm
from megatron_r1.rl.generation.async_rollouts import RolloutSource
from megatron_r1.rl.generation.rollouts import Rollout
from megatron_r1.rl.learner import Learner
from megatron_r1.rl.placement import Placement, Separate
from megatron_r1.rollout.sample import Sample
from megatron_r1.train.loop import Step, StepUnavailable
from megatron_r1.train.state import TrainState

logger = logging.getLogger(__name__)


def reinforcement_step(
    rollouts: RolloutSource | None,
    learner: Learner,
    publish: Callable[[str], None],
    prompts: int,
    placement: Placement | None = None,
    received: Callable[[], Any] = comm.receive_broadcast,
) -> Step:
    """One step of reinforcement learning, for the training loop.

    All that can fail for want of an engine comes first, when weights and state still agree.

    Args:
        rollouts: gives each step's samples, on rank 0; the other ranks have none and are told.
        learner: trains on them.
        publish: sends the weights to the engine under a version.
        prompts: that one rollout takes from the data.
        placement: whose turn it is with the devices; None is `Separate`.
        received: how the other ranks wait to be told.
    """
    turns = placement or Separate()

    idle = IdleShares(rollouts)

    def step(state: TrainState) -> tuple[TrainState, dict[str, Any]]:
        started = time.perf_counter()
        with turns.engine_phase():
            send_weights(publish, str(state.step))
            sent = time.perf_counter()
            with turns.generating():
                rollout = broadcast_rollout(rollouts, state, received)
        sampled = time.perf_counter()
        stale = staleness(rollout.samples, state.step)
        state, row = learner.learn(rollout.samples, state)
        state = replace(state, data_position=state.data_position + prompts)
        row |= (
            answer_metrics(rollout.samples)
            | rollout.counts
            | {
                **stale,
                **idle.since_last_time(waited=sampled - started),
                "perf/rollout_seconds": sampled - sent,
                "perf/engine_seconds": rollout.seconds,
                "perf/train_seconds": time.perf_counter() - sampled,
                "perf/sync_seconds": sent - started,
                "train/consumed_tokens": state.consumed_tokens,
            }
        )
        return state, row

    return step


def send_weights(publish: Callable[[str], None], version: str) -> None:
    """Publish the weights; once more where a server failed in the middle of it, which may be back by then.

    Raises:
        CannotBegin: the engine is gone. Several ranks may be in the middle of it when one fails, and then cannot save
            together: there the failure itself is raised.
    """
    try:
        publish(version)
    except NoRolloutCapacity as error:
        if dist.get_world_size() > 1:
            raise
        logger.error("weights %s: %s; they are sent once more", version, error)
        try:
            publish(version)
        except NoRolloutCapacity as again:
            raise StepUnavailable(again) from again


def broadcast_rollout(
    rollouts: RolloutSource | None, state: TrainState, received: Callable[[], Any] = comm.receive_broadcast
) -> Rollout:
    """Collective: the rollout of the next step.

    Raises:
        CannotBegin: there is none to be had; on all ranks.
    """
    found: Rollout | NoRolloutCapacity
    if rollouts:
        try:
            found = rollouts.take(state.step + 1, state.data_position)
        except NoRolloutCapacity as error:
            found = error
        comm.broadcast(found)
    else:
        found = received()
    if isinstance(found, NoRolloutCapacity):
        raise StepUnavailable(found)
    return found


def staleness(samples: Sequence[Sample], step: int) -> dict[str, float]:
    """Steps by which the weights that sampled a token are older than those that learn: at most, and on average; and the
    share of answers that weights changed under."""
    tokens = [(step - int(version), count) for sample in samples for version, count in tokens_by_version(sample)]
    return {
        "rollout/staleness_max": max(stale for stale, _ in tokens),
        "rollout/staleness_mean": sum(stale * count for stale, count in tokens) / sum(count for _, count in tokens),
        "rollout/multi_version": sum(bool(sample.version_changes) for sample in samples) / len(samples),
    }


def tokens_by_version(sample: Sample) -> list[tuple[str, int]]:
    """Versions of the weights that sampled a response, in order, and how many tokens each."""
    changes = [(0, sample.weight_version), *sample.version_changes]
    ends = [*(place for place, _ in sample.version_changes), len(sample.response_tokens)]
    return [(version, end - start) for (start, version), end in zip(changes, ends, strict=True)]


class IdleShares:
    """How much of the time trainer and engine wait for each other; known where the engine is."""

    def __init__(self, rollouts: RolloutSource | None):
        self._rollouts = rollouts
        self._at, self._busy = time.perf_counter(), rollouts.busy_seconds if rollouts else 0.0

    def since_last_time(self, waited: float) -> dict[str, float]:
        """Shares of the time since the last call.

        Args:
            waited: seconds of it that the trainer did not learn.
        """
        if not self._rollouts:
            return {}
        now, busy = time.perf_counter(), self._rollouts.busy_seconds
        seconds, worked = now - self._at, busy - self._busy
        self._at, self._busy = now, busy
        return {"perf/trainer_idle": waited / seconds, "perf/engine_idle": max(0.0, 1.0 - worked / seconds)}


def answer_metrics(samples: Sequence[Sample]) -> dict[str, float]:
    """What a rollout's answers look like: mean reward and its parts, length, share cut off, share of idle groups."""
    count = len(samples)
    groups: dict[int, list[float]] = {}
    for sample in samples:
        groups.setdefault(sample.group, []).append(sample.reward)
    return {
        "rollout/reward": sum(sample.reward for sample in samples) / count,
        **{
            f"rollout/reward/{name}": sum(sample.reward_parts[name] for sample in samples) / count
            for name in samples[0].reward_parts
        },
        "rollout/accuracy": sum(sample.reward_parts.get("accuracy", 0.0) > 0 for sample in samples) / count,
        "rollout/format": sum(sample.reward_parts.get("format", 0.0) > 0 for sample in samples) / count,
        "rollout/response_length": sum(len(sample.response_tokens) for sample in samples) / count,
        "rollout/truncated": sum(sample.finish_reason == "length" for sample in samples) / count,
        "rollout/zero_std_groups": sum(len(set(rewards)) == 1 for rewards in groups.values()) / len(groups),
        **step_metrics(samples),
    }


def step_metrics(samples: Sequence[Sample]) -> dict[str, float]:
    """How many rewarded steps an answer has, and what one is worth; nothing where no answer has any."""
    values = [value for sample in samples for _, value in sample.steps]
    return (
        {"rollout/rewarded_steps": len(values) / len(samples), "rollout/step_reward": sum(values) / len(values)}
        if values
        else {}
    )
