"""A recipe: stages in order, each a run of its own."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_r1.config.checks import at_least
from megatron_r1.errors import ConfigError

TRAINING_VERBS = ("pretrain", "sft", "reward_model", "dpo", "grpo")
STAGE_VERBS = (*TRAINING_VERBS, "evaluate", "sample", "convert", "report")


@dataclass(kw_only=True, slots=True)
class StageConfig:
    """One stage: a verb, a recipe file and overrides."""

    verb: str = ""
    """Verb that runs."""
    config: str = ""
    """Recipe file in configs/; empty takes the verb's own."""
    needs: list[str] = field(default_factory=list)
    """Stages that must be done first."""
    overrides: list[str] = field(default_factory=list)
    """key=value, as on the command line; {STAGE} stands for that stage's run directory."""

    def __post_init__(self) -> None:
        if self.verb not in STAGE_VERBS:
            raise ConfigError("verb", self.verb, f"must be one of {', '.join(STAGE_VERBS)}")


@dataclass(kw_only=True, slots=True)
class PipelineConfig:
    """The stages of a recipe."""

    stages: dict[str, StageConfig] = field(default_factory=dict)
    """Name -> stage; run in the order of their needs."""
    overrides: list[str] = field(default_factory=list)
    """key=value given to every stage."""
    ranks: int = 0
    """Ranks of each training stage, on this machine; 0 takes the fewest that `parallel` allows."""

    def __post_init__(self) -> None:
        at_least(self, 0, "ranks")
        for name, stage in self.stages.items():
            for need in stage.needs:
                if need not in self.stages:
                    raise ConfigError(f"stages.{name}.needs", need, f"must be one of {', '.join(self.stages)}")
