"""What the verbs that learn from judged responses have in common: examples, epochs, the step, results."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from megatron_r1.config.run import RunConfig
from megatron_r1.data.preference.examples import PairEncoder, PreferenceDataset, TokenizedPreference, encode_preferences
from megatron_r1.data.preference_example import PreferenceExample
from megatron_r1.errors import DataError
from megatron_r1.parallel.comm import all_gather_object
from megatron_r1.parallel.launcher import is_rank_zero
from megatron_r1.preference.measure import show
from megatron_r1.runs.training_run import TrainingRun, limit_steps
from megatron_r1.train.guard import count_skips
from megatron_r1.train.hooks.balance import load_metrics
from megatron_r1.train.loop import Step
from megatron_r1.train.metrics import mean_logged
from megatron_r1.train.routing import check_none_dropped
from megatron_r1.train.schedule import learning_rate
from megatron_r1.train.state import TrainState
from megatron_r1.train.step import UpdateResult

logger = logging.getLogger(__name__)


class UpdateOutcome(NamedTuple):
    """What learning from a global batch did."""

    result: UpdateResult
    positions: int
    """Tokens of this data-parallel rank's micro-batches, padding included."""


Learn = Callable[[Sequence[TokenizedPreference], float], UpdateOutcome]
"""Collective: learns from a global batch of examples, the same on every rank, at a learning rate."""


def examples_of(
    items: Sequence[PreferenceExample], encoder: PairEncoder, config: RunConfig, epochs: int
) -> list[TokenizedPreference]:
    """Items as tokens; those too long for a row are left out and counted.

    Raises:
        DataError: none is left for a step.
    """
    examples, dropped = encode_preferences(items, encoder, config.train.sequence_length)
    log_dropped("items to learn from", len(examples), dropped)
    if len(examples) * epochs < config.train.global_batch_size:
        allowed = f"must be at most {len(examples) * epochs}, the items there are"
        raise DataError(f"train.global_batch_size={config.train.global_batch_size}: {allowed}")
    return examples


def log_dropped(what: str, kept: int, dropped: int) -> None:
    """Say how many items there are and how many are longer than a row; a warning where any is."""
    if is_rank_zero():
        level = logging.WARNING if dropped else logging.INFO
        logger.log(level, "%d %s, %d left out as longer than a row", kept, what, dropped)


def with_epoch_steps(config: RunConfig, items: int) -> RunConfig:
    """The same run with the whole batches that its epochs have, or fewer where train.steps says so."""
    return limit_steps(config, items // config.train.global_batch_size)


def preference_step(run: TrainingRun, preferences: PreferenceDataset, learn: Learn) -> Step:
    """The step of such a run: next batch, update, metrics."""
    config, settings = run.config, run.config.train

    def step(state: TrainState) -> tuple[TrainState, dict[str, Any]]:
        started = time.perf_counter()
        batch = preferences.batch(state.data_position, settings.global_batch_size)
        rate = learning_rate(settings.schedule, state.step + 1, settings.steps, state.consumed_tokens)
        result, positions = learn(batch, rate)
        seconds = time.perf_counter() - started
        tokens = sum(len(row.tokens) for example in batch for row in example.sequences)
        sharing = config.parallel.tensor * config.parallel.pipeline
        computed = sum(all_gather_object(positions)) // sharing
        # Multi-token layers do not run.
        loads = {layer: load_E for layer, load_E in result.passes.expert_load.items() if not layer.startswith("mtp")}
        check_none_dropped(loads, computed, config.model.moe.top_k)
        state = state.advance(
            updates=state.updates + (not result.skipped),
            consumed_tokens=state.consumed_tokens + tokens,
            data_position=state.data_position + settings.global_batch_size,
            skipped_in_row=count_skips(
                state.skipped_in_row, result.skipped, settings.max_skipped_steps, state.step + 1
            ),
        )
        return state, {
            **mean_logged(result),
            "gradient_norm": result.gradient_norm,
            "skipped": int(result.skipped),
            **load_metrics(loads),
            "learning_rate": rate,
            "epoch": state.data_position / len(preferences.examples),
            "consumed_tokens": state.consumed_tokens,
            "tokens_per_second": tokens / seconds,
        }

    return step


def report_results(run: TrainingRun, results: dict[str, Any], judge: str) -> None:
    """Leave the results in the run's folder and on the terminal.

    Args:
        judge: what orders, or labels, the items.
    """
    if is_rank_zero():
        (run.folder / "accuracy.json").write_text(json.dumps(results, indent=1))
        show(results, judge)
