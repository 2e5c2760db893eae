"""How a stage of training treats the routers: what balances the experts, if anything does.

DeepSeek-V3 pre-trains with a balancing bias, whose step falls to 0 for the last tokens, and a small sequence-wise loss
(sections 2.1.2 and 4.2). Post-training leaves the balance as pre-training made it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from megatron_r1.config.run import RunConfig
from megatron_r1.config.schedule import PhaseConfig
from megatron_r1.model.chunks import Model, chunks
from megatron_r1.train.schedule import value_at


@dataclass(frozen=True, kw_only=True)
class RoutingPolicy:
    """What is done for balance, by consumed tokens."""

    bias_rate: float
    """Step of the balancing bias before the first phase; 0 leaves the bias alone."""
    bias_rate_phases: Sequence[PhaseConfig] = ()
    sequence_loss: float
    """Weight of the sequence-wise balance loss; 0 has none."""

    def bias_rate_at(self, tokens: int) -> float:
        """Step of the balancing bias after `tokens` consumed tokens."""
        return value_at(self.bias_rate, self.bias_rate_phases, tokens)

    def apply(self, model: Model, tokens: int) -> None:
        """Make the model's next update follow the policy; megatron-core reads both values anew each time."""
        for part in chunks(model):
            part.config.moe_router_bias_update_rate = self.bias_rate_at(tokens)
            part.config.moe_aux_loss_coeff = self.sequence_loss


FROZEN = RoutingPolicy(bias_rate=0.0, sequence_loss=0.0)
"""Post-training: no step of the bias, no balance loss."""


def pretraining_policy(config: RunConfig) -> RoutingPolicy:
    """What the configuration says about balance in pre-training."""
    moe = config.model.moe
    return RoutingPolicy(
        bias_rate=moe.bias_update_rate,
        bias_rate_phases=config.train.schedule.bias_rate_phases,
        sequence_loss=moe.sequence_loss_coefficient,
    )


def check_none_dropped(expert_load: Mapping[str, Tensor], tokens: int, top_k: int) -> None:
    """Every token must have visited `top_k` experts of every sparse layer (DeepSeek-V3 report, section 2.1.2).

    Args:
        expert_load: tokens per expert [E] by layer, of a whole batch.
        tokens: of the batch.

    Raises:
        RuntimeError: tokens were dropped, which nothing in this package asks for.
    """
    for layer, load_E in expert_load.items():
        if (visits := int(load_E.double().sum())) != tokens * top_k:
            raise RuntimeError(f"{layer}: {tokens} tokens made {visits} visits to experts, not {top_k} each")
