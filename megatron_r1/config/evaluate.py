"""How a model is measured."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_r1.config.checks import at_least, one_of, within


@dataclass(kw_only=True, slots=True)
class EvaluateConfig:
    """Held-out accuracy, greedy and sampled."""

    models: dict[str, str] = field(default_factory=dict)
    """Name -> run, checkpoint or hf:FOLDER; evaluated one after the other by the same engine."""
    benchmark: str = "arithmetic"
    """What is asked: arithmetic, or assistant (general tasks, judged by rules that no training sees)."""
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
