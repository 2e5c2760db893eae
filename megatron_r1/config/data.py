"""Training data: pre-training text, generated worlds and prompt files."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from megatron_r1.config.checks import at_least, is_function_path, one_of, within
from megatron_r1.config.reward import DOMAINS
from megatron_r1.errors import ConfigError


@dataclass(kw_only=True, slots=True)
class PromptsConfig:
    """Your own questions for reinforcement learning, sampling and evaluation, instead of the generated world's."""

    path: str = ""
    """A file (.jsonl, .json, .parquet, .arrow, .csv; JSON also gzipped), or the folder of a Hugging Face dataset; empty
    takes the generated world's questions."""
    split: str = "train"
    """Split to read from a folder."""
    subset: str = ""
    """Configuration to read from a folder that has several; empty takes the one that its README calls default."""
    question_field: str = "question"
    """Field of a row with the question."""
    answer_field: str = "answer"
    """Field of a row with the true answer, which the row's verifier must be able to read. Of a worked solution it is
    what follows `####` or stands in its box. Rows may lack it with reward.accuracy=0."""
    answer_pattern: str = ""
    """Regular expression that finds the true answer in the answer field: the first group of its last match, or all of
    the match where it has no group."""
    answer_function: str = ""
    """Your own function, FILE.py:NAME, that takes a row as a dict and returns its true answer as text."""
    task_field: str = "task"
    """Field of a row that names its verifier: number, text, choice, math, code, or reasoning_gym: and the name of a
    task. Answers to rows without it are verified by reward.verifier."""
    id_field: str = ""
    """Field of a row with its unique id; empty takes the line number."""
    reward_domain: str = ""
    """Which rewards score the responses to all rows (reward.domains): reasoning, helpfulness or harmlessness; empty
    takes what each row says."""
    reward_domain_field: str = "reward_domain"
    """Field of a row that says so; rows without it are of reasoning."""
    pass_rate_field: str = "pass_rate"
    """Field of a row with the share of sampled responses that were correct, from 0 to 1."""
    min_pass_rate: float = 0.0
    """Prompts with a lower pass rate are left out, each listed in left_out.txt; prompts without one stay."""
    max_pass_rate: float = 1.0
    """Prompts with a higher pass rate are left out likewise."""
    max_bad_rows: int = 0
    """Bad rows that may be dropped, each listed in bad_rows.txt; more than this are an error."""

    def __post_init__(self) -> None:
        at_least(self, 0, "max_bad_rows")
        one_of(self, "reward_domain", ("", *DOMAINS))
        within(self, 0.0, 1.0, "min_pass_rate", "max_pass_rate")
        if self.min_pass_rate > self.max_pass_rate:
            allowed = f"must be at most max_pass_rate={self.max_pass_rate}"
            raise ConfigError("min_pass_rate", self.min_pass_rate, allowed)
        if self.answer_pattern and self.answer_function:
            raise ConfigError("answer_function", self.answer_function, "must be empty with answer_pattern: give one")
        if self.answer_function and not is_function_path(self.answer_function):
            raise ConfigError("answer_function", self.answer_function, "must be FILE.py:NAME")
        try:
            re.compile(self.answer_pattern)
        except re.error as error:
            allowed = f"must be a regular expression: {error}"
            raise ConfigError("answer_pattern", self.answer_pattern, allowed) from None


@dataclass(kw_only=True, slots=True)
class MixedPromptsConfig:
    """One source of a mixture of prompts: a file, or where that has no path a generated world."""

    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    """The source's questions, as data.prompts."""
    world: str = "arithmetic"
    """Generated world of a source without a path: arithmetic, or assistant (its general tasks alone)."""
    share: float = 1.0
    """Share of the prompts of a step, relative to the other sources of that step."""
    from_step: int = 0
    """First step, counted from 0, that has prompts of this source; below 0 it counts from the end: -25 is the last 25
    steps."""

    def __post_init__(self) -> None:
        one_of(self, "world", ("arithmetic", "assistant"))
        within(self, 1e-9, 1e9, "share")

    def first_step(self, steps: int) -> int:
        """The first step with prompts of this source, in a run of so many steps."""
        return self.from_step if self.from_step >= 0 else max(0, steps + self.from_step)


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
    """Your own questions instead of the world's; read by grpo, sample and evaluate."""
    mixture: dict[str, MixedPromptsConfig] = field(default_factory=dict)
    """Name -> source of prompts; several sources in one rollout instead of prompts or the world; read by grpo."""
    indexed: IndexedConfig = field(default_factory=IndexedConfig)
    """Tokenised datasets; read where source is indexed."""

    def __post_init__(self) -> None:
        one_of(self, "source", ("arithmetic", "assistant", "indexed"))
        at_least(self, 0, "seed")
        at_least(self, 100, "num_documents")
        at_least(self, 512, "vocab_size")
        if self.mixture and self.prompts.path:
            raise ConfigError("prompts.path", self.prompts.path, "must be empty with mixture, which has all sources")
        within(self, 0.01, 0.5, "eval_fraction")
        within(self, 0.0, 1.0, "reasoning_gym_share", "arithmetic_share")
