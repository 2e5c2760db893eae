"""Degrees of parallelism."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import lcm

from megatron_r1.config.checks import at_least
from megatron_r1.errors import ConfigError


@dataclass(kw_only=True, slots=True)
class ParallelConfig:
    """Degrees of parallelism; the data-parallel degree is the number of ranks divided by the others' product."""

    tensor: int = 1
    """Ranks that share each layer's matrices (with sequence parallelism above 1)."""
    pipeline: int = 1
    """Ranks that share the layers."""
    virtual_pipeline: int = 1
    """Interleaved stages of each pipeline rank, which make it wait less; above 1 needs pipeline above 1."""
    pipeline_layers: list[int] = field(default_factory=list)
    """Layers of each stage, first to last, pipeline x virtual_pipeline numbers; empty divides them evenly."""
    expert: int = 1
    """Ranks that share the routed experts."""
    expert_tensor: int = 1
    """Ranks that share each expert's matrices."""
    context: int = 1
    """Ranks that share each sequence."""

    def __post_init__(self) -> None:
        at_least(self, 1, "tensor", "pipeline", "virtual_pipeline", "expert", "expert_tensor", "context")
        if self.virtual_pipeline > 1 and self.pipeline == 1:
            raise ConfigError("virtual_pipeline", self.virtual_pipeline, "must be 1 where pipeline=1")
        if self.pipeline_layers and len(self.pipeline_layers) != self.stages:
            raise ConfigError(
                "pipeline_layers", self.pipeline_layers, f"must be {self.stages} numbers, pipeline x virtual_pipeline"
            )
        if any(layers < 1 for layers in self.pipeline_layers):
            raise ConfigError("pipeline_layers", self.pipeline_layers, "must leave every stage at least 1 layer")

    @property
    def stages(self) -> int:
        """Number of stages into which the layers are divided."""
        return self.pipeline * self.virtual_pipeline

    def fewest_ranks(self) -> int:
        """The smallest number of ranks for these degrees."""
        model = self.tensor * self.pipeline * self.context
        experts = self.expert * self.expert_tensor * self.pipeline
        return lcm(model, experts)
