"""What stages after pre-training do with routers and with multi-token layers."""

from __future__ import annotations

import logging
from collections.abc import Callable

from megatron_r1.config.run import RunConfig
from megatron_r1.model.names import in_multi_token_layer, in_router
from megatron_r1.platform.launcher import is_rank_zero
from megatron_r1.runs.training_run import TrainingRun
from megatron_r1.train.routing import post_training_policy

logger = logging.getLogger(__name__)


def trained_weights(config: RunConfig, multi_token_layers: bool = False) -> Callable[[str], bool]:
    """A function of a parameter's name: whether the stage trains it.

    Args:
        multi_token_layers: whether the stage trains them; otherwise they are saved as they were loaded.
    """

    def trained(name: str) -> bool:
        if in_multi_token_layer(name) and not multi_token_layers:
            return False
        return config.routing.train_weights or not in_router(name)

    return trained


def begin_post_training(run: TrainingRun, multi_token_layers: bool = False) -> None:
    """Set the routers' balancing for the whole run, and log what happens to routers and multi-token layers.

    Args:
        multi_token_layers: as of `trained_weights`.
    """
    post_training_policy(run.config).apply(run.model, 0)
    if is_rank_zero() and (lines := [*policy_lines(run.config, multi_token_layers)]):
        logger.info("%s", "; ".join(lines))


def policy_lines(config: RunConfig, multi_token_layers: bool) -> list[str]:
    """What the stage does with the model's routers and multi-token layers; nothing of what the model has not."""
    routing, model = config.routing, config.model
    lines = []
    if model.moe.num_experts:
        weights = "trained" if routing.train_weights else "frozen"
        rates = f"balancing bias by {routing.bias_update_rate:g}, balance loss by {routing.sequence_loss_coefficient:g}"
        balance = rates if routing.bias_update_rate or routing.sequence_loss_coefficient else "balancing at rest"
        lines.append(f"routers: weights {weights}, {balance}")
    if model.mtp.num_layers:
        weight = f"trained with weight {model.mtp.loss_coefficient:g}"
        lines.append(f"multi-token layers: {weight if multi_token_layers else 'saved as they were loaded'}")
    return lines
