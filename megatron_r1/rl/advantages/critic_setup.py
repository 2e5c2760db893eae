"""The critic of a run: built beside the policy, from its first weights or a reward model's, or from a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_r1.errors import ConfigError
from megatron_r1.model.build import build_model
from megatron_r1.model.chunks import in_multi_token_layer
from megatron_r1.model.reward_head import HEAD, add_reward_head, with_head
from megatron_r1.model.shards import load_whole_tensors
from megatron_r1.rl.advantages.critic import Critic
from megatron_r1.runs.initial_weights import Weights, check_same_model, find_weights
from megatron_r1.runs.training_run import TrainingRun
from megatron_r1.train.optimizer import Optimizer

KEY = "rl.critic.init_from"


def critic_of(run: TrainingRun, policy: Weights) -> Critic:
    """Collective: the critic, as its checkpoint left it where the run goes on from one.

    Args:
        policy: the weights that the policy starts from.

    Raises:
        ConfigError: rl.critic.init_from names no reward model of the policy's shape.
        DataError: the run goes on from a checkpoint without a critic.
    """
    config, settings = run.config, run.config.rl.critic
    # The policy's draws must not depend on whether a critic was built beside it.
    with torch.random.fork_rng():
        model = build_model(
            config.model, config.parallel, run.platform, config.seed, config.performance, config.precision
        )
    add_reward_head(model)
    if not run.resumed:
        load_whole_tensors(model, _first_weights(run, policy))
    for name, parameter in model.named_parameters():
        # No value depends on the words' logits.
        parameter.requires_grad_(not in_multi_token_layer(name) and "output_layer" not in name.split("."))
    critic = Critic(model, Optimizer(model, config.train, config.performance), settings.clip)
    if run.resumed:
        critic.restore(run.saved)
    return critic


def _first_weights(run: TrainingRun, policy: Weights) -> Mapping[str, Tensor]:
    source = run.config.rl.critic.init_from
    if not source:
        return with_head(policy.tensors, run.config.model.hidden_size)
    found = find_weights(source, KEY)
    if f"{HEAD}.weight" not in found.tensors:
        raise ConfigError(KEY, source, "must be a run of the verb reward, or one of its checkpoints")
    check_same_model(run.config.model, found.model, source)
    return found.tensors
