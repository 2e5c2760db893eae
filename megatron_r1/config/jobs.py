"""Jobs that train nothing: evaluation, sampling and diagnosis; and where a run's metrics go."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_r1.config.checks import at_least, one_of, within
from megatron_r1.errors import ConfigError


@dataclass(kw_only=True, slots=True)
class EvaluateConfig:
    """Held-out accuracy, greedy and sampled: pass@1 over all samples, pass@k, cons@k, and how responses are written."""

    models: dict[str, str] = field(default_factory=dict)
    """Name -> run, checkpoint or hf:FOLDER; evaluated one after the other by the same engine."""
    benchmark: str = "arithmetic"
    """arithmetic, assistant (general tasks, scored by rules that no training uses), or a published benchmark, whose
    file data.prompts.path names and whose fields are known: gsm8k, math500, aime, gpqa (four options, in an order by
    seed) or humaneval (tests in the sandbox). With arithmetic, data.prompts.path names prompts of your own."""
    num_prompts: int = 512
    """Number of held-out prompts, or most prompts of data.prompts.path, from the first."""
    samples_per_prompt: int = 4
    """Sampled responses per prompt."""
    instruction: str = ""
    """Text after every question, such as how to write the answer; empty for none."""
    every: int = 0
    """Evaluate the kept checkpoints of the run in init.from, each so many of them and the last, as a curve over
    training: 1 takes all, 0 only the newest."""
    temperature: float = 1.0
    """Temperature of the sampled responses; each prompt gets a greedy response too."""

    def __post_init__(self) -> None:
        one_of(self, "benchmark", ("arithmetic", "assistant", "gsm8k", "math500", "aime", "gpqa", "humaneval"))
        at_least(self, 0, "every")
        at_least(self, 1, "num_prompts", "samples_per_prompt")
        if self.every and self.models:
            raise ConfigError("every", self.every, "must be 0 with evaluate.models: its checkpoints are init.from's")
        within(self, 0.01, 10.0, "temperature")


@dataclass(kw_only=True, slots=True)
class SampleConfig:
    """A sampling job: its prompts, and the format of its output."""

    max_prompts: int = 0
    """Number of prompts, from the first; 0 takes all of a file. A generated world is endless and needs a number."""
    samples_per_prompt: int = 4
    """Responses per prompt."""
    prompts_per_part: int = 64
    """Prompts whose responses are sampled and written together; a killed job loses one such part at most."""
    format: str = "jsonl"
    """Format of the output: jsonl or parquet."""
    prompt_style: str = "plain"
    """Text around each question: plain, few_shot, direct, rewrite, summary, general (configs/prompt_style), or a file
    with {question} and, to show a given response, {response}."""
    response_field: str = "response"
    """Field of a row of data.prompts with the response that a style such as rewrite shows."""

    def __post_init__(self) -> None:
        one_of(self, "format", ("jsonl", "parquet"))
        at_least(self, 0, "max_prompts")
        at_least(self, 1, "samples_per_prompt", "prompts_per_part")


@dataclass(kw_only=True, slots=True)
class DiagnoseConfig:
    """A diagnosis: the saved batch of responses that it examines, and its tolerance."""

    rollout_file: str = ""
    """A file of a run's rollouts folder; empty takes the newest one of the run in init.from for whose weights the run
    still has a checkpoint."""
    max_samples: int = 128
    """Number of responses to examine, from the first; 0 takes all."""
    tolerance: float = 1e-4
    """Mean difference of log-probabilities, in nats, that is still normal; bf16 needs about 0.03."""

    def __post_init__(self) -> None:
        at_least(self, 0, "max_samples")
        at_least(self, 1e-9, "tolerance")


@dataclass(kw_only=True, slots=True)
class TrackConfig:
    """wandb."""

    wandb: str = "auto"
    """auto (online with a key, else offline), online, offline or disabled."""
    project: str = "megatron_r1"
    """wandb project."""
    entity: str = ""
    """Team or user that owns the project; empty takes the key's own."""
    group: str = ""
    """Group of runs in wandb. A recipe gives its name to its stages; empty leaves a run alone."""
    tags: list[str] = field(default_factory=list)
    """Further tags, beside the verb."""
    notes: str = ""
    """Notes on the run's page."""
    prometheus_port: int = 0
    """Port at which rank 0 serves its metrics to Prometheus; 0 serves none."""
    prometheus_host: str = "127.0.0.1"
    """Address to serve them at; 0.0.0.0 is every network of the node, without a password."""

    def __post_init__(self) -> None:
        within(self, 0, 65535, "prometheus_port")
        one_of(self, "wandb", ("auto", "online", "offline", "disabled"))
