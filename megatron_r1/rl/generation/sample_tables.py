"""Which responses of a rollout a person reads: a few, from all over it, cut to a readable length."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megatron_r1.config.rl import RLConfig
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.rollout.sample import Sample, response_of

ShowSamples = Callable[[int, Sequence[Sample]], None]
"""Called on rank 0 with the number of a step and its rollout."""
MOST_CHARACTERS = 2000
"""Of a prompt, and of a response: its beginning and its end, where it is longer."""


def show_none(step: int, samples: Sequence[Sample]) -> None:
    """Shows nothing."""


def show_some(
    settings: RLConfig, tokenizer: Tokenizer, record: Callable[[int, Sequence[Mapping[str, Any]]], None]
) -> ShowSamples:
    """Records a table every `rl.sample_table_interval` steps; a function of the step's number and its samples.

    Args:
        record: keeps the table of a step.
    """

    def show(step: int, samples: Sequence[Sample]) -> None:
        if step % settings.sample_table_interval == 0:
            record(step, [row_of(step, sample, tokenizer) for sample in spread(samples, settings.sample_table_rows)])

    return show


def spread(samples: Sequence[Sample], count: int) -> list[Sample]:
    """So many of them, or all, from the first on at equal distances."""
    count = min(count, len(samples))
    return [samples[index * len(samples) // count] for index in range(count)]


def row_of(step: int, sample: Sample, tokenizer: Tokenizer) -> dict[str, Any]:
    """A response as a row: prompt, response, reward and its parts, and how it ended."""
    return {
        "step": step,
        "prompt": shortened(tokenizer.decode(response_of(sample).prompt_tokens.tolist())),
        "response": shortened(sample.text),
        "reward": sample.reward,
        **{f"reward/{name}": value for name, value in sample.reward_parts.items()},
        "tokens": sample.response_length,
        "finish_reason": sample.finish_reason,
        "weight_version": sample.weight_version,
        "prompt_id": sample.prompt_id,
    }


def shortened(text: str) -> str:
    """The text, or its beginning and its end around the number of characters between them."""
    left_out = len(text) - MOST_CHARACTERS
    if left_out <= 0:
        return text
    half = MOST_CHARACTERS // 2
    return f"{text[:half]} [... {left_out} characters ...] {text[-half:]}"
