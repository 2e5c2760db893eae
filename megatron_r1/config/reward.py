"""What an answer is worth."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_r1.config.checks import at_least, one_of, within
from megatron_r1.config.judge import JudgeConfig
from megatron_r1.errors import ConfigError


@dataclass(kw_only=True, slots=True)
class SandboxConfig:
    """What a program that a model wrote may use; every limit ends it, and none is an error of the run."""

    parallel: int = 2
    """Programs that run at the same time."""
    wall_s: float = 10.0
    """Seconds from start to end, of one run of a program or of a compiler."""
    cpu_s: int = 5
    """Processor seconds of one process."""
    memory_mib: int = 512
    """Address space of one process, and what all processes of a program hold together; a compiler gets 4 times it."""
    disk_mib: int = 32
    """Size of the one folder that can be written, which is in memory."""
    processes: int = 16
    """Processes and threads at the same time."""
    output_kib: int = 1024
    """What a program may print."""
    per_test: bool = True
    """Whether the reward is the share of tests passed; otherwise it is 1 where all pass, else 0."""

    def __post_init__(self) -> None:
        at_least(self, 1, "parallel", "cpu_s", "disk_mib", "output_kib")
        within(self, 1, 256, "parallel")
        within(self, 0.1, 3600, "wall_s")
        within(self, 64, 1 << 20, "memory_mib")
        within(self, 4, 4096, "processes")


@dataclass(kw_only=True, slots=True)
class MathConfig:
    """How answers are compared as mathematics: by math-verify, in processes of their own that can be killed."""

    workers: int = 2
    """Answers that are judged at the same time."""
    deadline_s: float = 4.0
    """Seconds after which an answer is wrong and its worker is killed."""
    longest: int = 1000
    """Characters; a longer answer is wrong without being read."""

    def __post_init__(self) -> None:
        within(self, 1, 256, "workers")
        within(self, 0.5, 600, "deadline_s")
        within(self, 1, 100_000, "longest")


@dataclass(kw_only=True, slots=True)
class RewardConfig:
    """Weights of the rewards; the score is their weighted sum."""

    accuracy: float = 1.0
    """Weight of a right answer."""
    format: float = 0.1
    """Weight of reasoning and answer being inside their tags."""
    language: float = 0.0
    """Weight of the share of the reasoning's words that are of the wanted language (R1, equation 7)."""
    overlong: float = 0.0
    """Weight of the penalty for length, from 0 down to -1 (DAPO, equation 13)."""
    repetition: float = 0.0
    """Weight of the penalty for repeated runs of words, from 0 down to -1."""
    helpfulness: float = 0.0
    """Weight of a response's helpfulness, by the reward model in `helpfulness_model`."""
    harmlessness: float = 0.0
    """Weight of a response's harmlessness, by the reward model in `harmlessness_model`."""
    judge: float = 0.0
    """Weight of the verdicts of a language model, as `judge_by` says."""
    own: float = 0.0
    """Weight of the function that `function` names."""
    steps: float = 0.0
    """Weight of each step's reward, by `steps_by`; steps are not part of the score: rl.advantages makes use of them."""
    format_style: str = "strict"
    """strict: every tag closed, once, in order; lenient: an answer tag that is opened need not be closed."""
    answer_in: str = "tags"
    """Where the answer is looked for: tags, boxed, or any (tags, then boxed, then the last number)."""
    verifier: str = "number"
    """How an answer is compared where its task has no verifier of its own: number, text or math."""
    target_language: str = "question"
    """en, zh, or question: that of the question."""
    overlong_tokens: int = 4096
    """Longest response in tokens (L_max); reaching it costs the whole penalty."""
    overlong_buffer: int = 1024
    """Tokens before it over which the penalty grows (L_cache)."""
    repetition_words: int = 20
    """Words of a run that counts as repeated."""
    helpfulness_model: str = ""
    """Run or checkpoint of the verb reward that learned from pairs; it scores summaries. All ranks share it as they do
    the policy, and it scores in the trainer's turn: with rollout.ahead, answers wait until the trainer's step ends."""
    harmlessness_model: str = ""
    """Run or checkpoint of the verb reward that learned what is safe; it scores whole responses, in the same turn."""
    function: str = ""
    """A function of yours, FILE.py:NAME; see configs/reward/own.yaml."""
    steps_by: str = ""
    """What rewards steps: arithmetic (1 for each equation of the reasoning that follows from the question), or a
    function of yours, FILE.py:NAME."""
    retries: int = 2
    """Further tries for an answer that could not be judged for no fault of its own."""
    math: MathConfig = field(default_factory=MathConfig)
    """How answers are compared as mathematics."""
    sandbox: SandboxConfig = field(default_factory=SandboxConfig)
    """What a program that a model wrote may use."""
    judge_by: JudgeConfig = field(default_factory=JudgeConfig)
    """Who judges, and how often."""

    def __post_init__(self) -> None:
        weights = (
            "accuracy", "format", "language", "overlong", "repetition", "helpfulness", "harmlessness", "judge", "own",
        )  # fmt: skip
        at_least(self, 0, *weights, "steps")
        one_of(self, "format_style", ("strict", "lenient"))
        one_of(self, "answer_in", ("tags", "boxed", "any"))
        one_of(self, "verifier", ("number", "text", "math"))
        one_of(self, "target_language", ("en", "zh", "question"))
        at_least(self, 1, "overlong_tokens", "overlong_buffer", "repetition_words")
        within(self, 0, 100, "retries")
        if not any(getattr(self, name) for name in weights):
            raise ConfigError("accuracy", self.accuracy, "at least one reward needs a weight above 0")
        if self.overlong_buffer > self.overlong_tokens:
            raise ConfigError(
                "overlong_buffer", self.overlong_buffer, f"must be at most overlong_tokens={self.overlong_tokens}"
            )
        if self.function and not _is_place(self.function):
            raise ConfigError("function", self.function, "must be FILE.py:NAME")
        if self.steps_by not in ("", "arithmetic") and not _is_place(self.steps_by):
            raise ConfigError("steps_by", self.steps_by, "must be arithmetic or FILE.py:NAME")
        for weight, key, source in (
            ("own", "function", self.function),
            ("steps", "steps_by", self.steps_by),
            ("helpfulness", "helpfulness_model", self.helpfulness_model),
            ("harmlessness", "harmlessness_model", self.harmlessness_model),
            ("judge", "judge_by.url", self.judge_by.url),
        ):
            if bool(source) != bool(getattr(self, weight)):
                allowed = f"is the weight of reward.{key}: both are given, or neither"
                raise ConfigError(weight, getattr(self, weight), allowed)

    @property
    def models(self) -> dict[str, str]:
        """Where the reward models that count come from, by the reward's name."""
        sources = {"helpfulness": self.helpfulness_model, "harmlessness": self.harmlessness_model}
        return {name: source for name, source in sources.items() if source}


def _is_place(text: str) -> bool:
    """Whether it reads FILE.py:NAME."""
    file, _, name = text.rpartition(":")
    return file.endswith(".py") and name.isidentifier()
