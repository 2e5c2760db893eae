"""What trades memory, speed and fusion against one another, and changes no result beyond rounding.

The names are megatron-core's own where it has them. What they need of one another is checked here; what they need of
the other sections is checked in `run`, and what they need of the machine in `refuse_on_cpu`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from megatron_r1.config.checks import one_of
from megatron_r1.errors import ConfigError

RECOMPUTABLE = ("core_attn", "layernorm", "mla_up_proj", "moe_act", "mlp", "moe", "shared_experts")
DISPATCHERS = ("allgather", "alltoall", "deepep", "hybridep")
_NEEDS_CUDA = {
    "overlap_expert_communication": "two CUDA streams",
    "delay_weight_gradients": "Transformer Engine's split backward pass",
    "overlap_shared_experts": "two CUDA streams",
    "fuse_gradient_accumulation": "NVIDIA Apex's kernel",
    "fuse_rope": "Transformer Engine's kernel",
}


@dataclass(kw_only=True, slots=True)
class PerformanceConfig:
    """Recomputation, overlap and fusion."""

    recompute: list[str] = field(default_factory=list)
    """Modules computed again in the backward pass instead of kept; DeepSeek-V3: layernorm, mla_up_proj, moe_act."""
    dispatcher: str = "alltoall"
    """How tokens travel to their experts: allgather, alltoall, deepep or hybridep."""
    overlap_expert_communication: bool = False
    """Run one micro-batch's all-to-all beside another's computation."""
    delay_weight_gradients: bool = False
    """Compute weight gradients apart from input gradients, to fill the gaps of the overlap."""
    overlap_shared_experts: bool = False
    """Run the shared experts beside the all-to-all of the routed ones."""
    overlap_gradient_reduction: bool = False
    """Sum gradients over data-parallel ranks beside the backward pass."""
    fuse_gradient_accumulation: bool = False
    """Add weight gradients to their fp32 buffer in the matrix product itself."""
    fuse_rope: bool = False
    """Apply rotary positions in one kernel; latent attention has it for YaRN only."""

    def __post_init__(self) -> None:
        for module in self.recompute:
            if module not in RECOMPUTABLE:
                raise ConfigError("recompute", module, f"must be some of {', '.join(RECOMPUTABLE)}")
        one_of(self, "dispatcher", DISPATCHERS)
        if self.delay_weight_gradients and not self.overlap_expert_communication:
            raise ConfigError("delay_weight_gradients", True, "needs overlap_expert_communication=true")
        if self.overlap_expert_communication:
            self._check_overlap()
        if self.overlap_shared_experts and self.dispatcher == "allgather":
            raise ConfigError("overlap_shared_experts", True, "needs another dispatcher than allgather")
        if self.overlap_shared_experts and "shared_experts" in self.recompute:
            raise ConfigError("recompute", "shared_experts", "cannot be while overlap_shared_experts=true")

    def _check_overlap(self) -> None:
        if self.dispatcher == "allgather":
            raise ConfigError("overlap_expert_communication", True, "needs another dispatcher than allgather")
        if "moe" in self.recompute:
            raise ConfigError("recompute", "moe", "cannot be while overlap_expert_communication=true")
        if self.overlap_shared_experts:
            raise ConfigError("overlap_shared_experts", True, "cannot be while overlap_expert_communication=true")


def refuse_on_cpu(performance: PerformanceConfig) -> None:
    """Refuse what only a GPU can do, rather than ignore it.

    Raises:
        ConfigError: names the first key that is not to be had on a CPU.
    """
    for item in fields(performance):
        if item.name in _NEEDS_CUDA and getattr(performance, item.name):
            raise ConfigError(f"performance.{item.name}", True, f"needs {_NEEDS_CUDA[item.name]}: false on a CPU")
    if performance.dispatcher in ("deepep", "hybridep"):
        raise ConfigError("performance.dispatcher", performance.dispatcher, "must be alltoall or allgather on a CPU")
