"""What a response is worth: weights of the rewards, verifiers, sandbox and the language model as a judge."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_r1.config.checks import at_least, one_of, within
from megatron_r1.errors import ConfigError


@dataclass(kw_only=True, slots=True)
class JudgeConfig:
    """Whom to ask, and how often. The key is read from JUDGE_API_KEY in the environment, and from nowhere else."""

    url: str = ""
    """Of the API, up to and including its version: http://host:port/v1."""
    model: str = "default"
    """Name of the model, as the endpoint knows it."""
    mode: str = "comparison"
    """comparison (with the prompt's reference answer, in both orders) or correctness (right or not, by that answer)."""
    votes: int = 4
    """Verdicts on each answer; of a comparison half in either order."""
    temperature: float = 0.6
    """Of the judge's sampling."""
    max_tokens: int = 1024
    """Longest verdict, its analysis included."""
    analysis_characters: int = 2000
    """Longest analysis before the verdict, so that a judge which rambles still comes to one; 0 sets no limit."""
    timeout_s: float = 120.0
    """Seconds that one call may take."""
    attempts: int = 3
    """Calls for one verdict before it is given up, whether the endpoint failed or gave no verdict."""
    concurrency: int = 32
    """Calls at a time."""

    def __post_init__(self) -> None:
        one_of(self, "mode", ("comparison", "correctness"))
        within(self, 0.0, 2.0, "temperature")
        at_least(self, 0, "analysis_characters")
        at_least(self, 1, "votes", "max_tokens", "attempts", "concurrency")
        within(self, 0.1, 3600.0, "timeout_s")
        if self.mode == "comparison" and self.votes % 2:
            raise ConfigError("votes", self.votes, "must be even: as many in either order")
        if self.url and not self.url.startswith(("http://", "https://")):
            raise ConfigError("url", self.url, "must begin with http:// or https://")


@dataclass(kw_only=True, slots=True)
class SandboxConfig:
    """What a program that a model wrote may use; every limit ends it, and none is an error of the run."""

    max_parallel: int = 2
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
        at_least(self, 1, "max_parallel", "cpu_s", "disk_mib", "output_kib")
        within(self, 1, 256, "max_parallel")
        within(self, 0.1, 3600, "wall_s")
        within(self, 64, 1 << 20, "memory_mib")
        within(self, 4, 4096, "processes")


@dataclass(kw_only=True, slots=True)
class MathConfig:
    """How answers are compared as mathematics: by math-verify, in processes of their own that can be killed."""

    workers: int = 2
    """Responses that are scored at the same time."""
    timeout_s: float = 4.0
    """Seconds after which an answer is wrong and its worker is killed."""
    max_characters: int = 1000
    """Characters; a longer answer is wrong without being read."""

    def __post_init__(self) -> None:
        within(self, 1, 256, "workers")
        within(self, 0.5, 600, "timeout_s")
        within(self, 1, 100_000, "max_characters")


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
    """Weight of the verdicts of a language model, as `judge_config` says."""
    custom: float = 0.0
    """Weight of the function that `custom_function` names."""
    steps: float = 0.0
    """Weight of each step's reward, by `step_rewards`; not part of the score, but for rl.advantage_estimator."""
    format_style: str = "strict"
    """strict: every tag closed, once, in order; lenient: an answer tag that is opened need not be closed."""
    answer_format: str = "tags"
    """Where the answer is looked for: tags, boxed, or any (tags, then boxed, then the last number)."""
    verifier: str = "number"
    """How an answer is compared where its task has no verifier of its own: number, text or math."""
    target_language: str = "question"
    """en, zh, or question: that of the question."""
    overlong_tokens: int = 4096
    """Longest response in tokens (L_max); reaching it costs the whole penalty."""
    overlong_buffer: int = 1024
    """Tokens before it over which the penalty grows (L_cache)."""
    repetition_ngram_size: int = 20
    """Words of a run that counts as repeated."""
    helpfulness_model: str = ""
    """Run or checkpoint of the verb reward that learned from pairs; it scores summaries. All ranks share it as they do
    the policy, and it scores between the trainer's steps: with rollout.max_staleness, responses wait for its end."""
    harmlessness_model: str = ""
    """Run or checkpoint of the verb reward that learned what is safe; it scores whole responses, in the same turn."""
    custom_function: str = ""
    """A function of yours, FILE.py:NAME; see configs/reward/custom.yaml."""
    step_rewards: str = ""
    """What rewards steps: arithmetic (1 for each equation of the reasoning that follows from the question), or a
    function of yours, FILE.py:NAME."""
    retries: int = 2
    """Further tries for a response that could not be scored through no fault of its own."""
    math: MathConfig = field(default_factory=MathConfig)
    """How answers are compared as mathematics."""
    sandbox: SandboxConfig = field(default_factory=SandboxConfig)
    """What a program that a model wrote may use."""
    judge_config: JudgeConfig = field(default_factory=JudgeConfig)
    """Who judges, and how often."""

    def __post_init__(self) -> None:
        weights = (
            "accuracy", "format", "language", "overlong", "repetition", "helpfulness", "harmlessness", "judge",
            "custom",
        )  # fmt: skip
        at_least(self, 0, *weights, "steps")
        one_of(self, "format_style", ("strict", "lenient"))
        one_of(self, "answer_format", ("tags", "boxed", "any"))
        one_of(self, "verifier", ("number", "text", "math"))
        one_of(self, "target_language", ("en", "zh", "question"))
        at_least(self, 1, "overlong_tokens", "overlong_buffer", "repetition_ngram_size")
        within(self, 0, 100, "retries")
        if not any(getattr(self, name) for name in weights):
            raise ConfigError("accuracy", self.accuracy, "at least one reward needs a weight above 0")
        if self.overlong_buffer > self.overlong_tokens:
            raise ConfigError(
                "overlong_buffer", self.overlong_buffer, f"must be at most overlong_tokens={self.overlong_tokens}"
            )
        if self.custom_function and not _is_place(self.custom_function):
            raise ConfigError("custom_function", self.custom_function, "must be FILE.py:NAME")
        if self.step_rewards not in ("", "arithmetic") and not _is_place(self.step_rewards):
            raise ConfigError("step_rewards", self.step_rewards, "must be arithmetic or FILE.py:NAME")
        for weight, key, source in (
            ("custom", "custom_function", self.custom_function),
            ("steps", "step_rewards", self.step_rewards),
            ("helpfulness", "helpfulness_model", self.helpfulness_model),
            ("harmlessness", "harmlessness_model", self.harmlessness_model),
            ("judge", "judge_config.url", self.judge_config.url),
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
