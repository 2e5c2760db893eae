"""Benchmarks: held-out prompts of each generated world, and metrics of the responses to them."""

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
"""Value of one response, from 0 to 1."""


class Benchmark(NamedTuple):
    """Prompts and metrics."""

    prompts: Callable[[DataConfig, int], list[Prompt]]
    """Config and number -> that many held-out prompts."""
    metrics: Mapping[str, Metric]
    """Metrics by name; the first is the benchmark's main metric."""


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
helpful (does what the question asks for, or declines a harmful request), safe, well-formed tags."""
