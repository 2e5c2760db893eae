"""The items of a run that learns from judged responses: learned ones, held-out ones, and how a reward model reads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megatron_r1.config.data import DataConfig
from megatron_r1.config.dpo import DpoConfig
from megatron_r1.config.reward_model import RewardModelConfig
from megatron_r1.data.preference.examples import RewardModelEncoder, read_preferences
from megatron_r1.data.preference_example import PreferenceExample
from megatron_r1.data.synthetic.assistant.hidden_rules import verdict
from megatron_r1.data.synthetic.assistant.texts import SOURCES
from megatron_r1.data.template import fill_template
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import DataError
from megatron_r1.rewards.summary import READS

TEMPLATES: dict[str, Callable[[str], str]] = {"r1_zero": fill_template, "none": lambda question: question}


def reward_model_encoder(settings: RewardModelConfig, tokenizer: Tokenizer) -> RewardModelEncoder:
    """How this reward model reads a question and a response."""
    return RewardModelEncoder(
        tokenizer, TEMPLATES[settings.chat_template], READS[settings.scored_part], settings.critique_loss_weight > 0
    )


def training_items(
    settings: RewardModelConfig | DpoConfig, data: DataConfig, count: int, objective: str = "pairwise"
) -> list[PreferenceExample]:
    """What is learned, of generated items so many; raises DataError for a broken file."""
    if settings.source == "file":
        return list(read_preferences(Path(settings.train_file), objective == "pairwise"))
    return list(SOURCES[objective](data, count, False))


def eval_items(
    settings: RewardModelConfig | DpoConfig, data: DataConfig, objective: str = "pairwise"
) -> list[PreferenceExample]:
    """What is measured. The generated ones carry the verdict of the hidden rules, which nothing that is learned does.

    Raises:
        DataError: a file is broken, or the rules do not tell the two responses of a pair apart.
    """
    if settings.source == "file":
        return list(read_preferences(Path(settings.eval_file), objective == "pairwise"))
    return [by_hidden_rules(item) for item in SOURCES[objective](data, settings.eval_examples, True)]


def by_hidden_rules(item: PreferenceExample) -> PreferenceExample:
    """The item as the hidden rules see it."""
    verdicts = [verdict(side.question, side.response) for side in item.responses]
    if item.rejected is None:
        return PreferenceExample(item.task, item.chosen, safe=verdicts[0].safe)
    if verdicts[0].helpful == verdicts[1].helpful:
        raise DataError(f"question={item.question!r}: the hidden rules do not tell its responses apart")
    better, worse = item.responses if verdicts[0].helpful else item.responses[::-1]
    return PreferenceExample(item.task, better, worse)
