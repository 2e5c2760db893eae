"""Training data: pre-training text, generated worlds and prompt files."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_r1.config.checks import at_least, one_of, within
from megatron_r1.errors import ConfigError


@dataclass(kw_only=True, slots=True)
class PromptsConfig:
    """Your own questions for reinforcement learning and sampling, instead of the generated world's."""

    path: str = ""
    """A .jsonl or .parquet file; empty takes the generated world's questions."""
    question_field: str = "question"
    """Field of a row with the question."""
    answer_field: str = "answer"
    """Field of a row with the true answer; for rows without it, responses are sampled and none is correct."""
    task_field: str = "task"
    """Field of a row that names its verifier: number, text, choice, math, code, or reasoning_gym: and the name of a
    task. Answers to rows without it are verified by reward.verifier."""
    id_field: str = ""
    """Field of a row with its unique id; empty takes the line number."""
    max_bad_rows: int = 0
    """Bad rows that may be dropped, each listed in bad_rows.txt; more than this are an error."""

    def __post_init__(self) -> None:
        at_least(self, 0, "max_bad_rows")
        if self.path and not self.path.endswith((".jsonl", ".parquet")):
            raise ConfigError("path", self.path, "must end in .jsonl or .parquet")


@dataclass(kw_only=True, slots=True)
class DatasetConfig:
    """One tokenised dataset of a blend."""

    path: str = ""
    """Folder that tools/tokenise.py made."""
    weight: float = 1.0
    """Share of the sequences, relative to the other datasets' weights."""

    def __post_init__(self) -> None:
        if not self.path:
            raise ConfigError("path", self.path, "must name a folder that tools/tokenise.py made")
        within(self, 1e-9, 1e9, "weight")


@dataclass(kw_only=True, slots=True)
class IndexedConfig:
    """Tokenised datasets, packed by best fit and blended."""

    datasets: dict[str, DatasetConfig] = field(default_factory=dict)
    """Name -> dataset; all of one tokenizer."""
    cross_document_attention: bool = True
    """Whether a token attends to the documents before its own in the sequence, as in DeepSeek-V3's pre-training."""
    verify_hashes: bool = True
    """Compare every file's SHA-256 at the start, which reads all of it once; sizes are always compared."""


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """A source of pre-training text, reinforcement-learning prompts and held-out problems."""

    source: str = "arithmetic"
    """What to pre-train on: arithmetic or assistant (generated worlds), or indexed (tokenised datasets)."""
    seed: int = 0
    """Seed of the generated world; another seed draws other documents, but the same held-out split."""
    num_documents: int = 100_000
    """Documents of pre-training text to generate."""
    vocab_size: int = 512
    """Vocabulary of the tokenizer that is trained on the source."""
    eval_fraction: float = 0.15
    """Share of expressions, and of the assistant world's questions, that no training text or prompt contains."""
    reasoning_gym_share: float = 0.2
    """Share of prompts drawn from reasoning-gym tasks."""
    arithmetic_share: float = 0.3
    """Share of worked arithmetic among the assistant world's documents."""
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    """Your own questions instead of the world's; read by grpo and sample."""
    indexed: IndexedConfig = field(default_factory=IndexedConfig)
    """Tokenised datasets; read where source is indexed."""

    def __post_init__(self) -> None:
        one_of(self, "source", ("arithmetic", "assistant", "indexed"))
        at_least(self, 0, "seed")
        at_least(self, 100, "num_documents")
        at_least(self, 512, "vocab_size")
        within(self, 0.01, 0.5, "eval_fraction")
        within(self, 0.0, 1.0, "reasoning_gym_share", "arithmetic_share")
