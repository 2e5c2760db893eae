"""Degrees of parallelism."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import lcm

from megatron_r1.config.checks import at_least
from megatron_r1.config.pipeline_stages import PipelineStage, divide_layers, mtp_stage, parse_layout, stages_with
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
    """Layers of each stage, first to last, pipeline x virtual_pipeline numbers; empty divides them, and where they do
    not divide evenly, the last stage has fewer, as it has multi-token layers and output head too."""
    pipeline_layout: str = ""
    """What each stage holds, as Megatron-LM writes it (pretrain only where m is in another stage than L): in
    Et*3|(tt|)*29,m|L E is the embedding, t a layer, m a multi-token layer, L the loss, and | ends a stage."""
    microbatch_group_size_per_vp_stage: int = 0
    """Micro-batches that one interleaved stage passes before its rank turns to its next stage; 0 takes the fewest that
    the micro-batches of a step allow, from pipeline on."""
    expert: int = 1
    """Ranks that share the routed experts."""
    expert_tensor: int = 1
    """Ranks that share each expert's matrices."""
    context: int = 1
    """Ranks that share each sequence."""

    def __post_init__(self) -> None:
        at_least(self, 1, "tensor", "pipeline", "virtual_pipeline", "expert", "expert_tensor", "context")
        at_least(self, 0, "microbatch_group_size_per_vp_stage")
        if self.virtual_pipeline > 1 and self.pipeline == 1:
            raise ConfigError("virtual_pipeline", self.virtual_pipeline, "must be 1 where pipeline=1")
        if 0 < self.microbatch_group_size_per_vp_stage < self.pipeline or (
            self.microbatch_group_size_per_vp_stage and self.virtual_pipeline == 1
        ):
            allowed = f"must be 0, or at least pipeline={self.pipeline} with virtual_pipeline above 1"
            raise ConfigError("microbatch_group_size_per_vp_stage", self.microbatch_group_size_per_vp_stage, allowed)
        if self.pipeline_layers:
            self._check_layers()
        if self.pipeline_layout:
            self._check_layout()

    def _check_layers(self) -> None:
        if len(self.pipeline_layers) != self.stages:
            raise ConfigError(
                "pipeline_layers", self.pipeline_layers, f"must be {self.stages} numbers, pipeline x virtual_pipeline"
            )
        if any(layers < (index < self.stages - 1) for index, layers in enumerate(self.pipeline_layers)):
            allowed = "must leave every stage but the last at least 1 layer"
            raise ConfigError("pipeline_layers", self.pipeline_layers, allowed)

    def _check_layout(self) -> None:
        if self.pipeline_layers:
            raise ConfigError("pipeline_layout", self.pipeline_layout, "must be empty where pipeline_layers is not")
        stage = mtp_stage(parse_layout(self.pipeline_layout, self.stages))
        if stage < self.stages - self.pipeline:
            allowed = f"must have m among the last {self.pipeline} stages, the last of each pipeline rank"
            raise ConfigError("pipeline_layout", self.pipeline_layout, allowed)
        if self.pipeline > 1 and stage % self.pipeline == 0:
            allowed = "must not have m on the first pipeline rank, which has the embedding already"
            raise ConfigError("pipeline_layout", self.pipeline_layout, allowed)

    @property
    def stages(self) -> int:
        """Number of stages into which the layers are divided."""
        return self.pipeline * self.virtual_pipeline

    def stages_of(self, num_layers: int, mtp_layers: int) -> list[PipelineStage]:
        """What each stage of a model holds.

        Args:
            mtp_layers: multi-token layers; 0 leaves those of `pipeline_layout` out.

        Raises:
            ConfigError: the model has other layers than were written, or fewer than there are stages.
        """
        if self.pipeline_layout:
            stages = parse_layout(self.pipeline_layout, self.stages)
            stages = stages if mtp_layers else [replace(stage, mtp_layers=0) for stage in stages]
            found = sum(stage.layers for stage in stages), sum(stage.mtp_layers for stage in stages)
            if found != (num_layers, mtp_layers):
                allowed = f"must have model.num_layers={num_layers} t and model.mtp.num_layers={mtp_layers} m"
                raise ConfigError("parallel.pipeline_layout", self.pipeline_layout, allowed)
            return stages
        if self.pipeline_layers and sum(self.pipeline_layers) != num_layers:
            allowed = f"must sum up to model.num_layers={num_layers}"
            raise ConfigError("parallel.pipeline_layers", self.pipeline_layers, allowed)
        layers = self.pipeline_layers or divide_layers(num_layers, mtp_layers, self.stages)
        if layers is None:
            key = "pipeline" if self.pipeline - 1 > num_layers else "virtual_pipeline"
            allowed = f"must leave every stage but the last a layer of model.num_layers={num_layers}"
            raise ConfigError(f"parallel.{key}", getattr(self, key), allowed)
        return stages_with(layers, mtp_layers)

    @property
    def mtp_rank(self) -> int:
        """The pipeline rank with the multi-token layers, and for them a copy of the embedding."""
        if not self.pipeline_layout:
            return self.pipeline - 1
        return mtp_stage(parse_layout(self.pipeline_layout, self.stages)) % self.pipeline

    def fewest_ranks(self) -> int:
        """The smallest number of ranks for these degrees."""
        model = self.tensor * self.pipeline * self.context
        experts = self.expert * self.expert_tensor * self.pipeline
        return lcm(model, experts)
