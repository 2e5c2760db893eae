"""One step of reinforcement learning: send the weights to the engine, get a rollout, train on it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch.distributed as dist

from megatron_r1.errors import NoRolloutCapacity
from megatron_r1.evaluation.behaviour import mixes_languages, reflection_words
from megatron_r1.parallel import comm
from megatron_r1.parallel.mesh import data_parallel_group
from megatron_r1.parallel.phases import phase
from megatron_r1.platform.launcher import is_rank_zero
from megatron_r1.rl.generation.async_rollouts import RolloutSource
from megatron_r1.rl.generation.reward_service import NoRewardModels, RewardService
from megatron_r1.rl.generation.rollouts import Rollout
from megatron_r1.rl.generation.sample_tables import ShowSamples, show_none
from megatron_r1.rl.learner import Learner
from megatron_r1.rl.placement import Placement, Separate
from megatron_r1.rollout.journal import FlatResponses
from megatron_r1.rollout.sample import Sample, response_of
from megatron_r1.train.loop import Step, StepUnavailable
from megatron_r1.train.state import TrainState

logger = logging.getLogger(__name__)

HEALTH = {
    "sent": "rollout/requests_sent",
    "failed": "rollout/requests_failed",
    "resent": "rollout/requests_resent",
    "restarts": "rollout/server_restarts",
}
"""Counter of an engine -> its metric."""


def reinforcement_step(
    rollouts: RolloutSource | None,
    learner: Learner,
    publish: Callable[[str], None],
    prompts_per_rollout: int,
    placement: Placement | None = None,
    service: RewardService | None = None,
    health: Callable[[], Mapping[str, int]] = dict,
    show: ShowSamples = show_none,
) -> Step:
    """The step for the training loop.

    Everything that fails without an engine comes first, so that an error leaves weights and state consistent.

    Args:
        rollouts: gives each step's samples, on rank 0; None on the other ranks, which receive theirs.
        learner: trains on them.
        publish: sends the weights to the engine under a version.
        prompts_per_rollout: prompts of the data that one rollout uses.
        placement: how engine and trainer share the devices' memory; None is `Separate`.
        service: the reward models, which all ranks serve while rank 0 takes a rollout; None is `NoRewardModels`.
        health: the engine's counters since its start; called on rank 0.
        show: shows some samples of a rollout to a person.
    """
    engine_counts = EngineCounts(health if rollouts else dict)
    placed, rewards, idle = placement or Separate(), service or NoRewardModels(), IdleShares(rollouts)

    def step(state: TrainState) -> tuple[TrainState, dict[str, Any]]:
        started = time.perf_counter()
        with placed.engine_phase():
            with phase("weight_sync"):
                send_weights(publish, str(state.step))
            with placed.generating(), phase("rollout"):
                rollout = broadcast_rollout(rollouts, state, rewards)
        writing = text_metrics([sample.text for sample in rollout.samples]) if rollouts else {}
        if rollouts:
            show(state.step + 1, rollout.samples)
        if dist.get_world_size() > 1:
            rollout = scatter_responses(rollout, learner.shares(rollout.samples, state.step))
        sampled = time.perf_counter()
        stale = staleness(rollout.samples, state.step)
        state, metrics = learner.learn(rollout.samples, state)
        state = replace(state, data_position=state.data_position + prompts_per_rollout)
        metrics |= (
            response_metrics(rollout.samples)
            | writing
            | rollout.counts
            | engine_counts.since_last_time()
            | {
                **stale,
                **idle.since_last_time(waited=sampled - started),
                "perf/engine_seconds": rollout.seconds,
                "train/consumed_tokens": state.consumed_tokens,
            }
        )
        return state, metrics

    return step


def send_weights(publish: Callable[[str], None], version: str) -> None:
    """Publish the weights; retry once where a server failed meanwhile, which may have restarted by then.

    Raises:
        StepUnavailable: the engine is gone.
        NoRolloutCapacity: the same with several ranks: they may have failed alone, and then cannot save together.
    """
    try:
        publish(version)
    except NoRolloutCapacity as error:
        if dist.get_world_size() > 1:
            raise
        logger.error("weight sync %s failed (%s); retrying once", version, error)
        try:
            publish(version)
        except NoRolloutCapacity as second:
            raise StepUnavailable(second) from second


def broadcast_rollout(rollouts: RolloutSource | None, state: TrainState, service: RewardService) -> Rollout:
    """Collective: the rollout of the next step; with its responses on rank 0 alone.

    Raises:
        StepUnavailable: there is none; on all ranks.
    """
    found: Rollout | NoRolloutCapacity
    if rollouts:
        try:
            found = rollouts.take(state.step + 1, state.data_position)
        except NoRolloutCapacity as error:
            found = error
        comm.broadcast(found.without_responses() if isinstance(found, Rollout) else found)
    else:
        found = service.serve()
    if isinstance(found, NoRolloutCapacity):
        raise StepUnavailable(found)
    return found


def scatter_responses(rollout: Rollout, shares: Sequence[Sequence[int]]) -> Rollout:
    """Collective: the rollout with the responses of this rank's share alone, from rank 0, which has all.

    Args:
        shares: samples, by index, of each data-parallel rank.
    """

    def arrays_of(rank: int) -> FlatResponses:
        return FlatResponses.of([response_of(rollout.samples[index]) for index in shares[rank]])

    flat = FlatResponses(*comm.scatter_over_data_parallel(arrays_of if is_rank_zero() else None))
    mine = dict(zip(shares[data_parallel_group().rank()], flat.responses(), strict=True))
    known = rollout.without_responses().samples
    return replace(rollout, samples=[replace(sample, response=mine.get(i)) for i, sample in enumerate(known)])


def staleness(samples: Sequence[Sample], step: int) -> dict[str, float]:
    """Steps by which the weights that sampled a token are older than those that are trained: largest and mean; and the
    share of responses during which the weights changed."""
    tokens = [(step - int(version), count) for sample in samples for version, count in tokens_by_version(sample)]
    return {
        "rollout/staleness_max": max(stale for stale, _ in tokens),
        "rollout/staleness_mean": sum(stale * count for stale, count in tokens) / sum(count for _, count in tokens),
        "rollout/multi_version": sum(bool(sample.version_changes) for sample in samples) / len(samples),
    }


def tokens_by_version(sample: Sample) -> list[tuple[str, int]]:
    """Versions of the weights that sampled a response, in order, with the number of tokens of each."""
    changes = [(0, sample.weight_version), *sample.version_changes]
    ends = [*(index for index, _ in sample.version_changes), sample.response_length]
    return [(version, end - start) for (start, version), end in zip(changes, ends, strict=True)]


class EngineCounts:
    """The engine's counters, by step."""

    def __init__(self, health: Callable[[], Mapping[str, int]]):
        self._health = health
        self._before: Mapping[str, int] = {}

    def since_last_time(self) -> dict[str, int]:
        """Requests and restarts since the last call, by metric; empty for an engine that sends no requests."""
        now, before = self._health(), self._before
        self._before = now
        return {metric: now[name] - before.get(name, 0) for name, metric in HEALTH.items() if name in now}


class IdleShares:
    """Shares of the time that trainer and engine wait for each other; known on the engine's rank."""

    def __init__(self, rollouts: RolloutSource | None):
        self._rollouts = rollouts
        self._since, self._busy = time.perf_counter(), rollouts.busy_seconds if rollouts else 0.0

    def since_last_time(self, waited: float) -> dict[str, float]:
        """Shares of the time since the last call.

        Args:
            waited: seconds of it in which the trainer did not train.
        """
        if not self._rollouts:
            return {}
        now, busy = time.perf_counter(), self._rollouts.busy_seconds
        seconds, worked = now - self._since, busy - self._busy
        self._since, self._busy = now, busy
        return {"perf/trainer_idle": waited / seconds, "perf/engine_idle": max(0.0, 1.0 - worked / seconds)}


def response_metrics(samples: Sequence[Sample]) -> dict[str, float]:
    """Mean reward and its parts, length, share of truncated responses, share of groups with equal rewards.

    A part's mean is that of the responses that it scores.
    """
    count = len(samples)
    groups: dict[int, list[float]] = {}
    parts: dict[str, list[float]] = {}
    for sample in samples:
        groups.setdefault(sample.group, []).append(sample.reward)
        for name, value in sample.reward_parts.items():
            parts.setdefault(name, []).append(value)
    return {
        "rollout/reward": sum(sample.reward for sample in samples) / count,
        **{f"rollout/reward/{name}": sum(values) / len(values) for name, values in parts.items()},
        "rollout/accuracy": share_above_zero(parts.get("accuracy", ())),
        "rollout/format": share_above_zero(parts.get("format", ())),
        "rollout/response_length": sum(sample.response_length for sample in samples) / count,
        "rollout/truncated": sum(sample.finish_reason == "length" for sample in samples) / count,
        "rollout/zero_std_groups": sum(len(set(rewards)) == 1 for rewards in groups.values()) / len(groups),
        **step_metrics(samples),
    }


def text_metrics(texts: Sequence[str]) -> dict[str, float]:
    """How the responses are written; known on the engine's rank, which alone has their text."""
    return {
        "rollout/mixed_language": sum(map(mixes_languages, texts)) / len(texts),
        "rollout/reflection_words": sum(map(reflection_words, texts)) / len(texts),
    }


def share_above_zero(values: Sequence[float]) -> float:
    """The share of values above 0; 0 where there are none."""
    return sum(value > 0 for value in values) / max(1, len(values))


def step_metrics(samples: Sequence[Sample]) -> dict[str, float]:
    """Mean number of rewarded steps of a response, and mean reward of a step; empty where no response has any."""
    values = [value for sample in samples for _, value in sample.steps]
    return (
        {"rollout/rewarded_steps": len(values) / len(samples), "rollout/step_reward": sum(values) / len(values)}
        if values
        else {}
    )
