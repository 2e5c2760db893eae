"""Shared by reward_model and dpo: encoded examples, epochs, the training step, results."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from megatron_r1.config.run import RunConfig
from megatron_r1.data.preference.examples import PairEncoder, PreferenceDataset, TokenizedPreference, encode_preferences
from megatron_r1.data.preference.policy_encoder import PolicyPairEncoder
from megatron_r1.data.preference_example import PreferenceExample
from megatron_r1.errors import DataError
from megatron_r1.files import write_whole
from megatron_r1.parallel.mesh import all_gather_data_parallel
from megatron_r1.platform.launcher import is_rank_zero
from megatron_r1.preference.measure import show
from megatron_r1.runs.training_run import TrainingRun, limit_steps
from megatron_r1.train.loop import Step
from megatron_r1.train.state import TrainState
from megatron_r1.train.step import BatchOutcome, training_step
from megatron_r1.train.update import UpdateResult

logger = logging.getLogger(__name__)


class UpdateOutcome(NamedTuple):
    """Result of an update on a global batch."""

    result: UpdateResult
    positions: int
    """Tokens of this data-parallel rank's micro-batches, padding included."""


LearnPreferences = Callable[[Sequence[TokenizedPreference], float], UpdateOutcome]
"""Collective: an update on a global batch of examples, the same on every rank, at a learning rate."""


def training_examples(
    preferences: Sequence[PreferenceExample], encoder: PairEncoder, config: RunConfig, epochs: int
) -> list[TokenizedPreference]:
    """Tokenised examples; those longer than a sequence are dropped, and their number is logged.

    Raises:
        DataError: fewer examples remain than one step needs.
    """
    examples, dropped = encode_preferences(preferences, encoder, config.train.sequence_length)
    log_dropped("training examples", len(examples), dropped)
    if len(examples) * epochs < config.train.global_batch_size:
        allowed = f"must be at most {len(examples) * epochs}, the number of training examples"
        raise DataError(f"train.global_batch_size={config.train.global_batch_size}: {allowed}")
    return examples


def encode_eval_pairs(
    preferences: Sequence[PreferenceExample], encoder: PolicyPairEncoder, longest: int
) -> tuple[list[PreferenceExample], list[TokenizedPreference]]:
    """Validation pairs and their tokens; pairs longer than `longest` are dropped, and their number is logged.

    Raises:
        DataError: no pair remains.
    """
    encoded = [(preference, encoder.example(preference)) for preference in preferences]
    used = [(preference, example) for preference, example in encoded if example.length <= longest]
    log_dropped("validation pairs", len(used), len(encoded) - len(used))
    if not used:
        raise DataError(f"train.sequence_length={longest}: holds none of the {len(encoded)} validation pairs")
    return [preference for preference, _ in used], [example for _, example in used]


def log_dropped(what: str, used: int, dropped: int) -> None:
    """Log how many examples are used and how many are dropped as too long; a warning where any is dropped."""
    if is_rank_zero():
        level = logging.WARNING if dropped else logging.INFO
        logger.log(level, "%d %s kept, %d dropped: longer than train.sequence_length", used, what, dropped)


def with_epoch_steps(config: RunConfig, examples: int) -> RunConfig:
    """The config with one step for each full batch of its epochs, or train.steps where that is fewer."""
    return limit_steps(config, examples // config.train.global_batch_size)


def preference_step(config: RunConfig, preferences: PreferenceDataset, learn: LearnPreferences) -> Step:
    """The training step: an update on the next batch of preferences."""
    size = config.train.global_batch_size

    def learn_next(state: TrainState, rate: float) -> BatchOutcome:
        batch = preferences.batch(state.data_position, size)
        result, positions = learn(batch, rate)
        return BatchOutcome(
            result=_of_backbone(result),
            sequences=size,
            tokens=sum(len(sequence.tokens) for example in batch for sequence in example.sequences),
            routed_tokens=sum(all_gather_data_parallel(positions)),
            metrics={"train/epoch": (state.data_position + size) / len(preferences.examples)},
        )

    return training_step(config, learn_next)


def _of_backbone(result: UpdateResult) -> UpdateResult:
    """The result without expert loads of multi-token layers, which do not run."""
    loads = {layer: load_E for layer, load_E in result.passes.expert_load.items() if not layer.startswith("mtp")}
    return replace(result, passes=replace(result.passes, expert_load=loads))


def report_results(run: TrainingRun, results: dict[str, Any], scorer: str) -> None:
    """Write the results to the run's folder and show them on the terminal.

    Args:
        scorer: name of what orders, or labels, the examples.
    """
    if is_rank_zero():
        write_whole(run.folder / "accuracy.json", json.dumps(results, indent=1).encode())
        show(results, scorer)
