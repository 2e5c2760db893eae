"""Sampling jobs: prompts in, by `data.prompts` or of a world; scored answers out."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_r1.config.checks import at_least, one_of


@dataclass(kw_only=True, slots=True)
class SampleConfig:
    """What is sampled, and how it is written."""

    max_prompts: int = 0
    """Prompts to take, from the first; 0 takes all of a file. A world has no end and needs it."""
    samples_per_prompt: int = 4
    """Answers per prompt."""
    prompts_per_part: int = 64
    """Prompts sampled and written together: what a kill loses at most."""
    format: str = "jsonl"
    """Of the result: jsonl or parquet."""

    def __post_init__(self) -> None:
        one_of(self, "format", ("jsonl", "parquet"))
        at_least(self, 0, "max_prompts")
        at_least(self, 1, "samples_per_prompt", "prompts_per_part")
