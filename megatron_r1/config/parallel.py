"""How many ranks share what."""

from __future__ import annotations

from dataclasses import dataclass
from math import lcm

from megatron_r1.config.checks import at_least


@dataclass(kw_only=True, slots=True)
class ParallelConfig:
    """Degrees of parallelism; data parallelism takes the ranks that are left."""

    tensor: int = 1
    """Ranks that share each layer's matrices (with sequence parallelism above 1)."""
    pipeline: int = 1
    """Ranks that share the layers."""
    expert: int = 1
    """Ranks that share the routed experts."""
    expert_tensor: int = 1
    """Ranks that share each expert's matrices."""
    context: int = 1
    """Ranks that share each sequence."""

    def __post_init__(self) -> None:
        at_least(self, 1, "tensor", "pipeline", "expert", "expert_tensor", "context")

    def fewest_ranks(self) -> int:
        """The smallest number of ranks that these degrees can divide among themselves."""
        model = self.tensor * self.pipeline * self.context
        experts = self.expert * self.expert_tensor * self.pipeline
        return lcm(model, experts)
