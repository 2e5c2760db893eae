"""How a stage of training balances the experts.

DeepSeek-V3 pre-trains with a balancing bias, whose step size falls to 0 for the last tokens, and a small sequence-wise
loss (sections 2.1.2 and 4.2). Stages after it balance only where `routing` says so.
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
    """Settings of the balancing, by consumed tokens."""

    bias_rate: float
    """Step size of the balancing bias before the first phase; 0 does not change the bias."""
    bias_rate_phases: Sequence[PhaseConfig] = ()
    sequence_loss: float
    """Weight of the sequence-wise balance loss; 0 turns it off."""

    def bias_rate_at(self, tokens: int) -> float:
        """Step size of the balancing bias after `tokens` consumed tokens."""
        return value_at(self.bias_rate, self.bias_rate_phases, tokens)

    def apply(self, model: Model, tokens: int) -> None:
        """Set both values in the model for its next update; megatron-core reads them in every update."""
        for part in chunks(model):
            part.config.moe_router_bias_update_rate = self.bias_rate_at(tokens)
            part.config.moe_aux_loss_coeff = self.sequence_loss


FROZEN = RoutingPolicy(bias_rate=0.0, sequence_loss=0.0)
"""No change of the bias, no balance loss."""


def pretraining_policy(config: RunConfig) -> RoutingPolicy:
    """The policy of the configuration for pre-training."""
    moe = config.model.moe
    return RoutingPolicy(
        bias_rate=moe.bias_update_rate,
        bias_rate_phases=config.train.schedule.bias_rate_phases,
        sequence_loss=moe.sequence_loss_coefficient,
    )


def post_training_policy(config: RunConfig) -> RoutingPolicy:
    """The policy of the configuration for stages after pre-training."""
    routing = config.routing
    return RoutingPolicy(bias_rate=routing.bias_update_rate, sequence_loss=routing.sequence_loss_coefficient)


def check_none_dropped(expert_load: Mapping[str, Tensor], tokens: int, top_k: int) -> None:
    """Check that every token visited `top_k` experts of every sparse layer (DeepSeek-V3 report, section 2.1.2).

    Args:
        expert_load: tokens per expert [E] by layer, of a whole batch.
        tokens: number of tokens of the batch.

    Raises:
        RuntimeError: tokens were dropped, which no setting of this package allows.
    """
    for layer, load_E in expert_load.items():
        if (visits := int(load_E.double().sum())) != tokens * top_k:
            raise RuntimeError(f"{layer}: {tokens} tokens made {visits} visits to experts, not {top_k} each")
