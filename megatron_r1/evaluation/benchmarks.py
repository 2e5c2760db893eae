"""Benchmarks: validation prompts of each generated world, and the metrics of a response to one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from megatron_r1.config.data import DataConfig
from megatron_r1.data.prompts.prompts import Prompt, eval_assistant_prompts, eval_prompts
from megatron_r1.data.synthetic.assistant.hidden_rules import verdict
from megatron_r1.rewards.accuracy import is_correct
from megatron_r1.rewards.extract import any_answer, tagged_answer
from megatron_r1.rewards.format import format_reward

Metric = Callable[[Prompt, str], float]
"""From 0 to 1, of one response."""


class Benchmark(NamedTuple):
    """Prompts and metrics."""

    prompts: Callable[[DataConfig, int], list[Prompt]]
    """So many validation prompts of a world."""
    metrics: Mapping[str, Metric]
    """By name; the first is what counts where one number is asked for."""


def _well_formed(prompt: Prompt, text: str) -> float:
    return format_reward(text, "strict")


def _correct_tagged(prompt: Prompt, text: str) -> float:
    return format_reward(text, "strict") * is_correct(prompt, tagged_answer(text))


BENCHMARKS: Mapping[str, Benchmark] = {
    "arithmetic": Benchmark(
        eval_prompts,
        {
            "correct_any_format": lambda prompt, text: float(is_correct(prompt, any_answer(text))),
            "correct_tagged": _correct_tagged,
            "format": _well_formed,
        },
    ),
    "assistant": Benchmark(
        eval_assistant_prompts,
        {
            "helpful": lambda prompt, text: float(verdict(prompt.question, text).helpful),
            "safe": lambda prompt, text: float(verdict(prompt.question, text).safe),
            "format": _well_formed,
        },
    ),
}
"""arithmetic: correct in any format, correct inside well-formed tags, well-formed tags. assistant, by the hidden rules:
does what was asked (or declines what is harmful), goes about nothing harmful, well-formed tags."""
