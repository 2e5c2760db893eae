"""Training and validation examples of reward_model and dpo, and the encoder of a reward model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megatron_r1.config.data import DataConfig
from megatron_r1.config.dpo import DpoConfig
from megatron_r1.config.reward_model import RewardModelConfig
from megatron_r1.data.preference.examples import RewardModelEncoder, read_preferences
from megatron_r1.data.preference_example import PreferenceExample
from megatron_r1.data.row_sources import RowSource
from megatron_r1.data.synthetic.assistant.hidden_rules import verdict
from megatron_r1.data.synthetic.assistant.texts import SOURCES
from megatron_r1.data.template import fill_template
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import DataError
from megatron_r1.rewards.summary import READS

TEMPLATES: dict[str, Callable[[str], str]] = {"r1_zero": fill_template, "none": lambda question: question}


def reward_model_encoder(settings: RewardModelConfig, tokenizer: Tokenizer) -> RewardModelEncoder:
    """The encoder with this reward model's settings."""
    return RewardModelEncoder(
        tokenizer, TEMPLATES[settings.chat_template], READS[settings.scored_part], settings.critique_loss_weight > 0
    )


def training_items(
    settings: RewardModelConfig | DpoConfig, data: DataConfig, count: int, objective: str = "pairwise"
) -> list[PreferenceExample]:
    """Training examples: those of the file, or `count` generated ones; raises DataError for a broken file."""
    if settings.source == "file":
        return list(read_preferences(_source(settings, "train"), objective == "pairwise"))
    return list(SOURCES[objective](data, count, False))


def eval_items(
    settings: RewardModelConfig | DpoConfig, data: DataConfig, objective: str = "pairwise"
) -> list[PreferenceExample]:
    """Validation examples: those of the file, or generated ones with labels by the hidden rules.

    Raises:
        DataError: a file is broken, or the rules give both responses of a pair the same verdict.
    """
    if settings.source == "file":
        return list(read_preferences(_source(settings, "eval"), objective == "pairwise"))
    return [by_hidden_rules(item) for item in SOURCES[objective](data, settings.eval_examples, True)]


def _source(settings: RewardModelConfig | DpoConfig, part: str) -> RowSource:
    """The rows for training (`train`) or for validation (`eval`)."""
    section = "dpo" if isinstance(settings, DpoConfig) else "reward_model"
    file, split = (getattr(settings, f"{part}_{name}") for name in ("file", "split"))
    keys = (f"{section}.{name}" for name in (f"{part}_file", f"{part}_split", "subset"))
    return RowSource(Path(file), split, settings.subset, *keys)


def by_hidden_rules(item: PreferenceExample) -> PreferenceExample:
    """The example with the labels of the hidden rules."""
    verdicts = [verdict(side.question, side.response) for side in item.responses]
    if item.rejected is None:
        return PreferenceExample(item.task, item.chosen, safe=verdicts[0].safe)
    if verdicts[0].helpful == verdicts[1].helpful:
        raise DataError(f"question={item.question!r}: the hidden rules give both responses the same verdict")
    chosen, rejected = item.responses if verdicts[0].helpful else item.responses[::-1]
    return PreferenceExample(item.task, chosen, rejected)
