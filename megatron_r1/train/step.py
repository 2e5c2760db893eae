"""The training step of every verb except reinforcement learning: an update on the next batch, and its metrics."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_r1.config.run import RunConfig
from megatron_r1.model.flops import flops_per_token, peak_flops
from megatron_r1.platform.launcher import world_size
from megatron_r1.train.loop import Step
from megatron_r1.train.metrics import update_metrics
from megatron_r1.train.routing import check_none_dropped
from megatron_r1.train.schedule import learning_rate
from megatron_r1.train.state import TrainState
from megatron_r1.train.update import UpdateResult, count_skips


@dataclass(frozen=True, kw_only=True)
class BatchOutcome:
    """Result of an update on a global batch. Numbers are of the whole batch, the same on every rank."""

    result: UpdateResult
    sequences: int
    """Sequences consumed from the data."""
    tokens: int
    """Tokens trained on, without padding."""
    routed_tokens: int
    """Tokens that went through each sparse layer, padding included."""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """Further metrics of this verb."""


LearnBatch = Callable[[TrainState, float], BatchOutcome]
"""Collective: an update on the batch at the state's position in the data, at a learning rate."""


def training_step(config: RunConfig, learn: LearnBatch, mfu_device: str = "") -> Step:
    """The step of a run: learning rate, update, check of the routing, state, metrics.

    Args:
        mfu_device: kind of device whose peak `mfu` is measured against; empty records none.
    """
    train = config.train
    flops = flops_per_token(config.model, train.sequence_length) if mfu_device else 0.0
    peak = peak_flops(mfu_device) * world_size() if mfu_device else 0.0

    def step(state: TrainState) -> tuple[TrainState, dict[str, Any]]:
        started = time.perf_counter()
        rate = learning_rate(train.schedule, state.step + 1, train.steps, state.consumed_tokens)
        outcome = learn(state, rate)
        seconds = time.perf_counter() - started
        result = outcome.result
        check_none_dropped(result.passes.expert_load, outcome.routed_tokens, config.model.moe.top_k)
        state = state.advance(
            updates=state.updates + (not result.skipped),
            consumed_tokens=state.consumed_tokens + outcome.tokens,
            data_position=state.data_position + outcome.sequences,
            skipped_in_row=count_skips(state.skipped_in_row, result.skipped, train.max_skipped_steps, state.step + 1),
        )
        row = {
            **update_metrics(result),
            **outcome.metrics,
            "train/learning_rate": rate,
            "train/consumed_tokens": state.consumed_tokens,
            "perf/tokens_per_second": outcome.tokens / seconds,
        }
        if mfu_device:
            row["perf/mfu"] = outcome.tokens * flops / seconds / peak
        return state, row

    return step
