"""Trades memory against speed; no key changes results beyond rounding.

The names are megatron-core's own where it has them. Conflicts between these keys are checked here, conflicts with other
sections in `run`, and requirements on the machine in `refuse_on_cpu`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from megatron_r1.config.checks import one_of
from megatron_r1.config.model import GroupedAttentionConfig, ModelConfig
from megatron_r1.errors import ConfigError

RECOMPUTABLE = ("core_attn", "layernorm", "mla_up_proj", "moe_act", "mlp", "moe", "shared_experts")
DISPATCHERS = ("allgather", "alltoall", "deepep", "hybridep")
_OF_EXPERTS = ("moe_act", "moe", "shared_experts")
_NEEDS_CUDA = {
    "gradient_accumulation_fusion": "NVIDIA Apex's kernel",
    "apply_rope_fusion": "Transformer Engine's kernel",
}


@dataclass(kw_only=True, slots=True)
class PerformanceConfig:
    """Recomputation, overlap and fusion."""

    recompute_modules: list[str] = field(default_factory=list)
    """Modules recomputed in the backward pass, of those that the model has; DeepSeek-V3 recomputes layernorm,
    mla_up_proj and moe_act."""
    moe_token_dispatcher_type: str = "alltoall"
    """How ranks exchange tokens for the experts: allgather, alltoall, deepep or hybridep."""
    overlap_moe_expert_parallel_comm: bool = False
    """Overlap the all-to-all of one micro-batch with the computation of another; in pretrain alone."""
    delay_wgrad_compute: bool = False
    """Compute weight gradients separately from input gradients, to fill gaps of the overlap."""
    moe_shared_expert_overlap: bool = False
    """Overlap the shared experts with the all-to-all of the routed ones."""
    overlap_grad_reduce: bool = False
    """Overlap the sum of gradients over data-parallel ranks with the backward pass."""
    gradient_accumulation_fusion: bool = False
    """Add weight gradients to their fp32 buffer in the matrix product itself."""
    apply_rope_fusion: bool = False
    """Apply rotary positions in one kernel; latent attention has it for YaRN only."""

    def __post_init__(self) -> None:
        for module in self.recompute_modules:
            if module not in RECOMPUTABLE:
                raise ConfigError("recompute_modules", module, f"must be some of {', '.join(RECOMPUTABLE)}")
        one_of(self, "moe_token_dispatcher_type", DISPATCHERS)
        if self.delay_wgrad_compute and not self.overlap_moe_expert_parallel_comm:
            raise ConfigError("delay_wgrad_compute", True, "needs overlap_moe_expert_parallel_comm=true")
        if self.overlap_moe_expert_parallel_comm:
            self._check_overlap()
        if self.moe_shared_expert_overlap and self.moe_token_dispatcher_type == "allgather":
            raise ConfigError("moe_shared_expert_overlap", True, "needs another dispatcher than allgather")
        if self.moe_shared_expert_overlap and "shared_experts" in self.recompute_modules:
            raise ConfigError("recompute_modules", "shared_experts", "cannot be while moe_shared_expert_overlap=true")

    def _check_overlap(self) -> None:
        if self.moe_token_dispatcher_type == "allgather":
            raise ConfigError("overlap_moe_expert_parallel_comm", True, "needs another dispatcher than allgather")
        if "moe" in self.recompute_modules:
            raise ConfigError("recompute_modules", "moe", "cannot be while overlap_moe_expert_parallel_comm=true")
        if self.moe_shared_expert_overlap:
            raise ConfigError(
                "moe_shared_expert_overlap", True, "cannot be while overlap_moe_expert_parallel_comm=true"
            )


def recomputed_modules(performance: PerformanceConfig, model: ModelConfig) -> list[str]:
    """Modules of this model that are recomputed: megatron-core refuses the names of those that a model lacks."""
    lacking = set(() if model.moe.num_experts else _OF_EXPERTS)
    if isinstance(model.attention, GroupedAttentionConfig):
        lacking.add("mla_up_proj")
    return [module for module in performance.recompute_modules if module not in lacking]


def refuse_without_transformer_engine(performance: PerformanceConfig) -> None:
    """Refuse what torch's modules cannot do.

    Raises:
        ConfigError: names the key.
    """
    if performance.delay_wgrad_compute:
        allowed = "must be false without Transformer Engine, whose backward pass can be split"
        raise ConfigError("performance.delay_wgrad_compute", True, allowed)


def refuse_on_cpu(performance: PerformanceConfig) -> None:
    """Refuse what only a GPU can do, rather than ignore it.

    Raises:
        ConfigError: names the first key that needs a GPU.
    """
    for item in fields(performance):
        if item.name in _NEEDS_CUDA and getattr(performance, item.name):
            raise ConfigError(f"performance.{item.name}", True, f"needs {_NEEDS_CUDA[item.name]}: false on a CPU")
    if performance.moe_token_dispatcher_type in ("deepep", "hybridep"):
        raise ConfigError(
            "performance.moe_token_dispatcher_type",
            performance.moe_token_dispatcher_type,
            "must be alltoall or allgather on a CPU",
        )
