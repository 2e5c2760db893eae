"""How stages after pre-training treat the routers of a mixture of experts."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_r1.config.checks import at_least


@dataclass(kw_only=True, slots=True)
class RoutingConfig:
    """Routers in sft, reward_model, dpo and grpo; pre-training has its own keys in model.moe and train.schedule.

    No paper says what R1's stages did. The default trains the weights and leaves the balance alone, as slime does; the
    options of the group are what other trainers do.
    """

    train_weights: bool = True
    """Whether the routers' weights are trained; otherwise they have no gradient and no moments, and are no part of the
    gradient norm (freeze_moe_router in NeMo RL)."""
    bias_update_rate: float = 0.0
    """Step of the balancing bias per optimizer step; 0 leaves the bias as pre-training left it. Padding counts as
    tokens."""
    sequence_loss_coefficient: float = 0.0
    """Weight of the sequence-wise balance loss, over the tokens of a forward pass; needs a model that was pre-trained
    with it (model.moe.sequence_loss_coefficient above 0)."""

    def __post_init__(self) -> None:
        at_least(self, 0, "bias_update_rate", "sequence_loss_coefficient")
