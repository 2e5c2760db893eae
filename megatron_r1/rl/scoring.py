"""Who judges an answer: the task's own verifier, inside the weighted rule rewards."""

from __future__ import annotations

from collections.abc import Callable

from megatron_r1.config.reward import RewardConfig
from megatron_r1.data.gym import TASKS, verify
from megatron_r1.data.prompts import Prompt
from megatron_r1.rewards.accuracy import same_number
from megatron_r1.rewards.extract import tagged_answer
from megatron_r1.rewards.score import Score, weighted

Scorer = Callable[[Prompt, str], Score]
"""Prompt and response text -> score."""


def is_right(prompt: Prompt, answer: str | None) -> bool:
    """Whether `answer` solves the prompt; reasoning-gym's tasks are judged by its own scorer."""
    if answer is None:
        return False
    if prompt.task in TASKS:
        return verify(prompt.task, answer, prompt.answer)
    return same_number(answer, prompt.answer)


def rule_scorer(config: RewardConfig) -> Scorer:
    """The configured rule rewards, with each task's own verdict on what stands in the answer tags."""

    def scorer(prompt: Prompt, response: str) -> Score:
        return weighted(is_right(prompt, tagged_answer(response)), response, config)

    return scorer
