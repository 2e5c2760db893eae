"""Builds the rubric of a configuration: every reward with a weight that is not 0."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from megatron_r1.config.reward import RewardConfig
from megatron_r1.errors import ConfigError
from megatron_r1.rewards.accuracy import Accuracy
from megatron_r1.rewards.custom import CustomReward, CustomStepRewards
from megatron_r1.rewards.format import format_reward
from megatron_r1.rewards.judge.reward import JudgeReward
from megatron_r1.rewards.language import LanguageReward
from megatron_r1.rewards.length import overlong
from megatron_r1.rewards.repetition import repetition
from megatron_r1.rewards.score import Rubric, TextRule, Weighted, WeightedSteps
from megatron_r1.rewards.steps import arithmetic_steps


def build_rubric(
    config: RewardConfig,
    count_tokens: Callable[[str], int] | None = None,
    models: Sequence[Weighted] = (),
    instructions: str = "",
) -> Rubric:
    """The configured rewards.

    Args:
        count_tokens: counts the tokens of a response text, for the penalty on length.
        models: rewards by trained models, which the caller runs.
        instructions: what the prompt says beside the question, which may request a language.

    Raises:
        ConfigError: the user's own function cannot be loaded, or `count_tokens` is needed and missing.
    """
    rewards = [Weighted(config.accuracy, Accuracy(config))] if config.accuracy else []
    if config.format:
        rule = TextRule("format", partial(format_reward, style=config.format_style))
        rewards.append(Weighted(config.format, rule))
    if config.language:
        rewards.append(Weighted(config.language, LanguageReward(config.target_language, instructions)))
    if config.repetition:
        rule = TextRule("repetition", partial(repetition, run=config.repetition_ngram_size))
        rewards.append(Weighted(config.repetition, rule))
    if config.overlong:
        if count_tokens is None:
            raise ConfigError("reward.overlong", config.overlong, "must be 0 where no tokenizer counts a response")
        count, limit, buffer = count_tokens, config.overlong_tokens, config.overlong_buffer
        rule = TextRule("overlong", lambda text: overlong(count(text), limit, buffer))
        rewards.append(Weighted(config.overlong, rule))
    if config.custom:
        rewards.append(Weighted(config.custom, CustomReward(config.custom_function)))
    if config.judge:
        rewards.append(Weighted(config.judge, JudgeReward(config.judge_config)))
    parts = [replace(part, domain=config.domains.get(part.reward.name)) for part in (*rewards, *models)]
    return Rubric(parts, config.retries, step_rewards(config))


def step_rewards(config: RewardConfig) -> WeightedSteps | None:
    """The configured rewards of reasoning steps; None where there are none.

    Raises:
        ConfigError: the user's own function cannot be loaded.
    """
    if not config.steps:
        return None
    rewards = arithmetic_steps if config.step_rewards == "arithmetic" else CustomStepRewards(config.step_rewards)
    return WeightedSteps(config.steps, rewards)
