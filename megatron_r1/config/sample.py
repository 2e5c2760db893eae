"""Sampling jobs: a file of prompts in, scored answers out."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_r1.config.checks import at_least, one_of


@dataclass(kw_only=True, slots=True)
class SampleConfig:
    """What is sampled, and how it is written."""

    prompts: str = ""
    """A .jsonl or .parquet file of prompts; empty takes the training prompts of the configured world."""
    question_field: str = "question"
    """Field of a row that holds the question."""
    answer_field: str = "answer"
    """Field of a row that holds the true answer; rows without it are sampled, and no answer to them is right."""
    task_field: str = "task"
    """Field of a row that says how its answer is judged: number, text, choice, math, code, or reasoning_gym:
    and the name of a task. Rows without it are judged as reward.verifier says."""
    id_field: str = ""
    """Field of a row that names it; empty numbers rows by their line."""
    template: str = "r1_zero"
    """What surrounds a question: r1_zero (the template of DeepSeek-R1-Zero) or none (the question is the prompt)."""
    limit: int = 0
    """Prompts to take, from the first; 0 takes all of a file. A world has no end and needs it."""
    samples: int = 4
    """Answers per prompt."""
    prompts_per_part: int = 64
    """Prompts sampled and written together: what a kill loses at most."""
    format: str = "jsonl"
    """Of the result: jsonl or parquet."""
    max_bad_rows: int = 0
    """Rows that may be left out, each named in bad_rows.txt, before the job is refused."""

    def __post_init__(self) -> None:
        one_of(self, "template", ("r1_zero", "none"))
        one_of(self, "format", ("jsonl", "parquet"))
        at_least(self, 0, "limit", "max_bad_rows")
        at_least(self, 1, "samples", "prompts_per_part")
