"""The loop of reinforcement learning: take a rollout, learn from it, send the weights, and again."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from megatron_r1.parallel import comm
from megatron_r1.rl.learner import Learner
from megatron_r1.rl.rollouts import Rollouts
from megatron_r1.rollout.sample import Sample
from megatron_r1.train.loop import Step
from megatron_r1.train.state import TrainState


def reinforcement_step(rollouts: Rollouts | None, learner: Learner, publish: Callable[[str], None]) -> Step:
    """One step of reinforcement learning, for the training loop.

    Args:
        rollouts: gives each step's samples, on rank 0; the other ranks have none and are told.
        learner: trains on them.
        publish: sends the weights to the engine under a version.
    """

    def step(state: TrainState) -> tuple[TrainState, dict[str, Any]]:
        started = time.perf_counter()
        samples = comm.broadcast(rollouts.take(state.step + 1, state.data_position) if rollouts else [])
        sampled = time.perf_counter()
        state, row = learner.learn(samples, state)
        learned = time.perf_counter()
        publish(str(state.step))
        row |= answer_metrics(samples) | {
            "rollout_seconds": sampled - started,
            "train_seconds": learned - sampled,
            "sync_seconds": time.perf_counter() - learned,
            "consumed_tokens": state.consumed_tokens,
        }
        return state, row

    return step


def answer_metrics(samples: Sequence[Sample]) -> dict[str, float]:
    """What a rollout's answers look like: mean reward and its parts, length, share cut off, share of idle groups."""
    count = len(samples)
    groups: dict[int, list[float]] = {}
    for sample in samples:
        groups.setdefault(sample.group, []).append(sample.reward)
    return {
        "reward": sum(sample.reward for sample in samples) / count,
        **{
            f"reward_{name}": sum(sample.reward_parts[name] for sample in samples) / count
            for name in samples[0].reward_parts
        },
        "accuracy": sum(sample.reward_parts.get("accuracy", 0.0) > 0 for sample in samples) / count,
        "format": sum(sample.reward_parts.get("format", 0.0) > 0 for sample in samples) / count,
        "response_length": sum(len(sample.response_tokens) for sample in samples) / count,
        "cut_off": sum(sample.finish_reason == "length" for sample in samples) / count,
        "equal_groups": sum(len(set(rewards)) == 1 for rewards in groups.values()) / len(groups),
    }
