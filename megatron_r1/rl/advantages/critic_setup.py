"""Builds a run's critic: from the policy's initial weights, a reward model's, or the checkpoint to resume from."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from megatron_r1.config.initial_model import check_same_model
from megatron_r1.model.reward_head import add_reward_head, with_head
from megatron_r1.parallel.comm import AllRanks
from megatron_r1.rl.advantages.critic import Critic
from megatron_r1.runs.initial_weights import InitialModel
from megatron_r1.runs.post_training import trained_weights
from megatron_r1.runs.second_model import find_reward_model, second_model
from megatron_r1.runs.training_run import TrainingRun
from megatron_r1.train.optimizer import Optimizer

KEY = "rl.critic.init_from"


def build_critic(run: TrainingRun, policy: InitialModel) -> Critic:
    """Collective: the critic; restored where the run resumes.

    Args:
        policy: what the policy starts from.

    Raises:
        ConfigError: rl.critic.init_from names no reward model of the policy's shape.
        DataError: the run resumes from a checkpoint without a critic.
    """
    config, settings = run.config, run.config.rl.critic
    tensors = None if run.resumed else _initial_tensors(run, policy)
    model = second_model(
        config.model, config.parallel, run.platform, tensors, add_reward_head, config.performance, config.fp8
    )
    trained = trained_weights(config)
    for name, parameter in model.named_parameters():
        # Values do not depend on the logits of tokens.
        parameter.requires_grad_(trained(name) and "output_layer" not in name.split("."))
    critic = Critic(model, Optimizer(model, config.train, config.performance), settings)
    if run.resumed:
        critic.restore(run.saved)
    return critic


def _initial_tensors(run: TrainingRun, policy: InitialModel) -> Mapping[str, Tensor]:
    source = run.config.rl.critic.init_from
    if not source:
        return with_head(policy.weights(AllRanks()).tensors, run.config.model.hidden_size)
    found = find_reward_model(source, KEY)
    check_same_model(run.config.model, found.model, source)
    return found.tensors
