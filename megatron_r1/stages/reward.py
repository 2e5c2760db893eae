"""reward: a reward model, which is a language model with a scalar head, learned from judged responses."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch.distributed as dist

from megatron_r1.config.run import RunConfig
from megatron_r1.data.judged import Item
from megatron_r1.data.preference import Encoder, Example, Preferences, encode
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import ConfigError, DataError
from megatron_r1.model.chunks import in_multi_token_layer
from megatron_r1.model.reward_head import add_reward_head, with_head
from megatron_r1.parallel.comm import AllRanks
from megatron_r1.parallel.mesh import data_parallel_group, leads, speaks_for_its_data, world_size
from megatron_r1.stages.reward_items import encoder_of, heldout_items, learned_items
from megatron_r1.stages.reward_measure import HeldoutAccuracy, results_of, show
from megatron_r1.stages.trainer import Trainer, finish, of_at_most, trainer
from megatron_r1.stages.weights import find_weights
from megatron_r1.train.guard import count_skips
from megatron_r1.train.hooks.balance import load_metrics
from megatron_r1.train.hooks.measure import MeasureHook
from megatron_r1.train.loop import Step, train
from megatron_r1.train.reward_model import RewardModel
from megatron_r1.train.routing import FROZEN, check_none_dropped
from megatron_r1.train.schedule import learning_rate
from megatron_r1.train.state import TrainState
from megatron_r1.train.step import UpdateResult, update

logger = logging.getLogger(__name__)

SHOWN = ("loss", "accuracy", "margin", "reasoning_loss", "heldout_accuracy", "gradient_norm", "learning_rate")


def run(config: RunConfig) -> None:
    """Train a reward model, or go on where its run stopped; then say how right it is on held-out items."""
    if not config.init.from_:
        raise ConfigError("init.from", "", "reward needs a model to start from: a run, a checkpoint or hf:FOLDER")
    settings = config.reward_model
    weights = find_weights(config.init.from_, which=config.init.weights)
    tokenizer = Tokenizer.load(weights.tokenizer_folder)
    encoder = encoder_of(settings, tokenizer)
    learned, heldout = learned_items(settings, config.data), heldout_items(settings, config.data)
    examples = examples_of(learned, encoder, config)
    config = with_steps(config, len(examples) * settings.epochs)
    weights = replace(weights, tensors=with_head(weights.tensors, config.model.hidden_size))
    with trainer(config, tokenizer, weights, trained(config), add_reward_head) as this:
        FROZEN.apply(this.model, 0)
        model = reward_model_of(this)
        measure = HeldoutAccuracy(model, encoder, heldout, settings.max_reasoning_tokens)
        hooks = this.hooks(
            SHOWN,
            f"reward {config.name}",
            first=[MeasureHook(measure, settings.heldout_interval, config.train.steps)],
        )
        state = train(
            this.state, reward_step(this, model, Preferences(examples, config.seed)), hooks, config.train.steps
        )
        if state.step >= config.train.steps:
            tell(this, results_of(measure.rights(), learned, heldout, encoder))
        finish(this, state)


def examples_of(items: Sequence[Item], encoder: Encoder, config: RunConfig) -> list[Example]:
    """Items as tokens; those too long for a row are left out and counted.

    Raises:
        DataError: none is left for a step.
    """
    examples, dropped = encode(items, encoder, config.train.sequence_length)
    if leads():
        logger.info("%d items to learn from, %d left out as longer than a row", len(examples), dropped)
    if len(examples) * config.reward_model.epochs < config.train.global_batch_size:
        allowed = f"must be at most {len(examples) * config.reward_model.epochs}, the items there are"
        raise DataError(f"train.global_batch_size={config.train.global_batch_size}: {allowed}")
    return examples


def with_steps(config: RunConfig, items: int) -> RunConfig:
    """The same run with the whole batches that its epochs have, or fewer where train.steps says so."""
    return of_at_most(config, items // config.train.global_batch_size)


def trained(config: RunConfig) -> Callable[[str], bool]:
    """Which parameters a score, or the judge's reasoning, depends on: by name, whether it is one."""
    words = config.reward_model.reasoning_weight > 0

    def depends(name: str) -> bool:
        return not in_multi_token_layer(name) and (words or "output_layer" not in name.split("."))

    return depends


def reward_model_of(this: Trainer) -> RewardModel:
    """The trainer's model at work."""
    settings = this.config.reward_model
    return RewardModel(
        this.model,
        settings.objective == "pairwise",
        settings.reasoning_weight,
        this.tokenizer.pad,
        this.platform.device,
        this.config.parallel.tensor,
    )


def reward_step(this: Trainer, model: RewardModel, preferences: Preferences) -> Step:
    """The step of a reward model: next batch, update, metrics."""
    config, settings = this.config, this.config.train
    group = data_parallel_group()
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)

    def step(state: TrainState) -> tuple[TrainState, dict[str, Any]]:
        started = time.perf_counter()
        batch = preferences.batch(state.data_position, settings.global_batch_size)
        rate = learning_rate(settings.schedule, state.step + 1, settings.steps, state.consumed_tokens)
        micro_batches = model.micro_batches(batch, rank, ranks, settings.micro_batch_size)
        length = max(rows.inputs_BL.shape[1] for rows in micro_batches)
        result = update(this.model, this.optimizer, micro_batches, model.forward, rate, length)
        seconds = time.perf_counter() - started
        tokens = sum(len(row.tokens) for example in batch for row in example.rows)
        computed = sum(AllRanks().gather(sum(rows.inputs_BL.numel() for rows in micro_batches))) * ranks // world_size()
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
            **mean_metrics(result),
            "gradient_norm": result.gradient_norm,
            "skipped": int(result.skipped),
            **load_metrics(loads),
            "learning_rate": rate,
            "epoch": state.data_position / len(preferences.examples),
            "consumed_tokens": state.consumed_tokens,
            "tokens_per_second": tokens / seconds,
        }

    return step


def mean_metrics(result: UpdateResult) -> dict[str, float]:
    """What the loss logged, as means over micro-batches and data-parallel ranks; the same on every rank."""
    mine = [{key: float(value) for key, value in entry.items()} for entry in result.passes.logged]
    told = [entry for part in AllRanks().gather(mine if speaks_for_its_data() else []) for entry in part]
    return {key: sum(entry[key] for entry in told) / len(told) for key in told[0]}


def tell(this: Trainer, results: dict[str, Any]) -> None:
    """Leave the results in the run's folder and on the terminal."""
    if leads():
        (this.folder / "accuracy.json").write_text(json.dumps(results, indent=1))
        show(results)
