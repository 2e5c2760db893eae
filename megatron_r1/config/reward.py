"""Rewards of a response: weights, verifiers, sandbox, and a language model as a judge."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_r1.config.checks import at_least, is_function_path, one_of, within
from megatron_r1.errors import ConfigError

WEIGHTS = (
    "accuracy", "format", "language", "overlong", "repetition", "helpfulness", "harmlessness", "judge", "custom",
)  # fmt: skip
"""Rewards whose weighted sum is a response's score."""


DOMAINS = ("reasoning", "helpfulness", "harmlessness")
"""Domains of prompts: where the answer is known, and by which preferences other responses are scored."""


@dataclass(kw_only=True, slots=True)
class JudgeConfig:
    """A language model as a judge, behind an API. The API key is read from JUDGE_API_KEY in the environment."""

    url: str = ""
    """URL of the API, up to and including its version: http://host:port/v1."""
    model: str = "default"
    """Name of the model at the endpoint."""
    mode: str = "comparison"
    """comparison (the judge compares the response with the prompt's reference answer, in both orders) or correctness
    (the judge decides by the reference answer whether the response is correct)."""
    votes: int = 4
    """Verdicts on each response; in a comparison, half of them in either order."""
    temperature: float = 0.6
    """Sampling temperature of the judge."""
    max_tokens: int = 1024
    """Longest reply of the judge in tokens, its analysis included."""
    analysis_characters: int = 2000
    """Longest analysis before the verdict, so that the judge reaches a verdict within max_tokens; 0 sets no limit."""
    timeout_s: float = 120.0
    """Seconds that one call may take."""
    attempts: int = 3
    """Calls for one verdict, failed calls and replies without a verdict included, before the response is unscored."""
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
    """Limits of a program that a model wrote. A program that exceeds one is ended; that is no error of the run."""

    max_parallel: int = 2
    """Programs that run at the same time."""
    wall_s: float = 10.0
    """Seconds of wall time that one run of a program or of a compiler may take."""
    cpu_s: int = 5
    """Processor seconds of one process."""
    memory_mib: int = 512
    """Address space of one process, and memory of all processes of a program together; a compiler gets 4 times this."""
    disk_mib: int = 32
    """Size of the only writable folder, which is in memory."""
    processes: int = 16
    """Processes and threads at the same time."""
    output_kib: int = 1024
    """Most output of a program."""
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
    """Mathematical comparison of answers by math-verify, in worker processes that can be killed."""

    workers: int = 2
    """Worker processes, each of which compares one answer at a time."""
    timeout_s: float = 4.0
    """Seconds after which the worker is killed and the answer counts as wrong."""
    max_characters: int = 1000
    """Longest answer in characters; a longer one counts as wrong without being parsed."""

    def __post_init__(self) -> None:
        within(self, 1, 256, "workers")
        within(self, 0.5, 600, "timeout_s")
        within(self, 1, 100_000, "max_characters")


@dataclass(kw_only=True, slots=True)
class RewardConfig:
    """Weights of the rewards; the score is their weighted sum."""

    accuracy: float = 1.0
    """Weight of a correct answer."""
    format: float = 0.1
    """Weight of the format: reasoning and answer inside their tags."""
    language: float = 0.0
    """Weight of the share of the reasoning's words that are in the target language (R1, equation 7)."""
    overlong: float = 0.0
    """Weight of the penalty for length, from 0 down to -1 (DAPO, equation 13)."""
    repetition: float = 0.0
    """Weight of the penalty for repeated n-grams of words, from 0 down to -1."""
    helpfulness: float = 0.0
    """Weight of a response's helpfulness, by the reward model in `helpfulness_model`."""
    harmlessness: float = 0.0
    """Weight of a response's harmlessness, by the reward model in `harmlessness_model`."""
    judge: float = 0.0
    """Weight of the verdicts of a language model; see `judge_config`."""
    custom: float = 0.0
    """Weight of the function that `custom_function` names."""
    steps: float = 0.0
    """Weight of the rewards of reasoning steps, see `step_rewards`. They are no part of the score, but inputs of
    rl.advantage_estimator."""
    format_style: str = "strict"
    """strict: every tag closed, once, in order; lenient: an answer tag that is opened need not be closed."""
    answer_format: str = "tags"
    """Where the answer stands in a response: tags, boxed, or any (tags, then boxed, then the last number)."""
    verifier: str = "number"
    """Verifier of answers to prompts whose task names none: number, text or math."""
    target_language: str = "question"
    """en, zh, or question (the language of the question)."""
    overlong_tokens: int = 4096
    """Response length in tokens (L_max) from which the penalty is -1."""
    overlong_buffer: int = 1024
    """Tokens before overlong_tokens over which the penalty grows from 0 to -1 (L_cache)."""
    repetition_ngram_size: int = 20
    """Size in words of the n-grams whose repetitions count."""
    helpfulness_model: str = ""
    """Run or checkpoint of the verb reward_model, trained on pairs; it scores summaries. It is divided among ranks like
    the policy and scores between the trainer's steps: with rollout.max_staleness, responses wait for a step's end."""
    harmlessness_model: str = ""
    """Run or checkpoint of the verb reward_model, trained on safety labels; it scores whole responses, when
    helpfulness_model does."""
    custom_function: str = ""
    """Your own reward function, FILE.py:NAME; see configs/reward/custom.yaml."""
    step_rewards: str = ""
    """Rewards of reasoning steps: arithmetic (1 for each equation that follows from the question), or your own
    function, FILE.py:NAME."""
    domains: dict[str, str] = field(default_factory=dict)
    """Name of a reward -> domain of the prompts whose responses it scores (reasoning, helpfulness or harmlessness);
    rewards without one score all responses. A prompt's domain is in its row, or that of its task in a generated
    world."""
    retries: int = 2
    """Further attempts to score a response after a failure that is not the response's fault."""
    math: MathConfig = field(default_factory=MathConfig)
    """Mathematical comparison of answers."""
    sandbox: SandboxConfig = field(default_factory=SandboxConfig)
    """Limits of programs that a model wrote."""
    judge_config: JudgeConfig = field(default_factory=JudgeConfig)
    """The judge and its verdicts."""

    def __post_init__(self) -> None:
        at_least(self, 0, *WEIGHTS, "steps")
        one_of(self, "format_style", ("strict", "lenient"))
        one_of(self, "answer_format", ("tags", "boxed", "any"))
        one_of(self, "verifier", ("number", "text", "math"))
        one_of(self, "target_language", ("en", "zh", "question"))
        at_least(self, 1, "overlong_tokens", "overlong_buffer", "repetition_ngram_size")
        for name, domain in self.domains.items():
            if name not in WEIGHTS:
                raise ConfigError(f"domains.{name}", domain, f"must be of one of {', '.join(WEIGHTS)}")
            if domain not in DOMAINS:
                raise ConfigError(f"domains.{name}", domain, f"must be one of {', '.join(DOMAINS)}")
        within(self, 0, 100, "retries")
        if self.overlong_buffer > self.overlong_tokens:
            raise ConfigError(
                "overlong_buffer", self.overlong_buffer, f"must be at most overlong_tokens={self.overlong_tokens}"
            )
        if self.custom_function and not is_function_path(self.custom_function):
            raise ConfigError("custom_function", self.custom_function, "must be FILE.py:NAME")
        if self.step_rewards not in ("", "arithmetic") and not is_function_path(self.step_rewards):
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

    def scores(self, name: str, domain: str) -> bool:
        """Whether a reward, by its name, scores responses to prompts of a domain."""
        return self.domains.get(name, domain) == domain

    @property
    def scores_responses(self) -> bool:
        """Whether any reward has a weight."""
        return any(getattr(self, name) for name in WEIGHTS)

    @property
    def reads_answers(self) -> bool:
        """Whether a reward compares responses with the true answers of their prompts."""
        return bool(self.accuracy or self.judge)

    @property
    def models(self) -> dict[str, str]:
        """Sources of the reward models with a weight above 0, by the reward's name."""
        sources = {"helpfulness": self.helpfulness_model, "harmlessness": self.harmlessness_model}
        return {name: source for name, source in sources.items() if source}
