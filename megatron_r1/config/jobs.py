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
    """arithmetic, or assistant (general tasks, scored by rules that no training uses)."""
    num_prompts: int = 512
    """Number of held-out prompts."""
    samples_per_prompt: int = 4
    """Sampled responses per prompt."""
    temperature: float = 1.0
    """Temperature of the sampled responses; each prompt gets a greedy response too."""

    def __post_init__(self) -> None:
        one_of(self, "benchmark", ("arithmetic", "assistant"))
        at_least(self, 1, "num_prompts", "samples_per_prompt")
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

    def __post_init__(self) -> None:
        one_of(self, "wandb", ("auto", "online", "offline", "disabled"))
