"""Jobs that train nothing: evaluation, sampling and diagnosis; and where a run's metrics go."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_r1.config.checks import at_least, one_of, within


@dataclass(kw_only=True, slots=True)
class EvaluateConfig:
    """Held-out accuracy, greedy and sampled."""

    models: dict[str, str] = field(default_factory=dict)
    """Name -> run, checkpoint or hf:FOLDER; evaluated one after the other by the same engine."""
    benchmark: str = "arithmetic"
    """What is asked: arithmetic, or assistant (general tasks, scored by rules that no training sees)."""
    num_prompts: int = 512
    """Held-out prompts."""
    samples_per_prompt: int = 4
    """Sampled answers per prompt."""
    temperature: float = 1.0
    """Temperature of the sampled answers."""

    def __post_init__(self) -> None:
        one_of(self, "benchmark", ("arithmetic", "assistant"))
        at_least(self, 1, "num_prompts", "samples_per_prompt")
        within(self, 0.01, 10.0, "temperature")


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


@dataclass(kw_only=True, slots=True)
class DiagnoseConfig:
    """Which saved batch is looked at, and how closely."""

    rollout_file: str = ""
    """A file of a run's rollouts folder; empty takes the newest of the run in init.from whose weights it still has."""
    max_samples: int = 128
    """Answers to look at, from the first; 0 takes all."""
    tolerance: float = 1e-4
    """Mean difference of log-probabilities, in nats, up to which nothing is wrong; bf16 needs about 0.03."""

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

    def __post_init__(self) -> None:
        one_of(self, "wandb", ("auto", "online", "offline", "disabled"))
