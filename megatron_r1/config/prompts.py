"""A file of questions: which fields hold what."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_r1.config.checks import at_least
from megatron_r1.errors import ConfigError


@dataclass(kw_only=True, slots=True)
class PromptsConfig:
    """Questions of your own, for reinforcement learning and for sampling, in the place of the world's."""

    path: str = ""
    """A .jsonl or .parquet file; empty takes the world's."""
    question_field: str = "question"
    """Field of a row that holds the question."""
    answer_field: str = "answer"
    """Field of a row that holds the true answer; rows without it are sampled, and no answer to them is right."""
    task_field: str = "task"
    """Field of a row that says how its answer is judged: number, text, choice, math, code, or reasoning_gym:
    and the name of a task. Rows without it are judged as reward.verifier says."""
    id_field: str = ""
    """Field of a row that names it; empty numbers rows by their line."""
    max_bad_rows: int = 0
    """Rows that may be left out, each named in bad_rows.txt, before the run is refused."""

    def __post_init__(self) -> None:
        at_least(self, 0, "max_bad_rows")
        if self.path and not self.path.endswith((".jsonl", ".parquet")):
            raise ConfigError("path", self.path, "must end in .jsonl or .parquet")
