"""Advantages from a critic's values: generalized advantage estimation over the tokens of a rollout, as PPO has it.

Shapes: S responses of this rank, L positions of a row, R tokens of the longest response.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_r1.config.rl import CriticConfig
from megatron_r1.parallel.mesh import data_parallel_group
from megatron_r1.rl.advantages.critic import Critic
from megatron_r1.rl.advantages.estimators import AdvantageInputs, RolloutAdvantages, ValueTargets
from megatron_r1.rl.advantages.gae import (
    explained_variance,
    generalized_advantages,
    spread,
    token_rewards,
    whitened,
)
from megatron_r1.rl.policy.batch import PerSample, at_positions, response_part
from megatron_r1.rollout.sample import Sample


class CriticAdvantages:
    """The return from a token on, compared with the critic's value."""

    def __init__(self, critic: Critic, settings: CriticConfig):
        self._critic, self._settings = critic, settings

    def estimate(self, inputs: AdvantageInputs) -> RolloutAdvantages:
        old_values = self._critic.values_by_sample(inputs.micro_batches)
        return self._from_values(inputs, old_values) if old_values else RolloutAdvantages({})

    def _from_values(self, inputs: AdvantageInputs, old_values: PerSample) -> RolloutAdvantages:
        """Collective over data-parallel ranks, on the last pipeline stage."""
        settings, indices = self._settings, sorted(old_values)
        samples = [inputs.samples[index] for index in indices]
        values_SR = _stacked([response_part(inputs.samples[index], old_values[index]) for index in indices])
        mask_SR = _stacked([values_SR.new_full((s.response_length,), float(s.in_loss)) for s in samples]).bool()
        penalties_SR = torch.zeros_like(values_SR)
        if inputs.penalties is not None:
            penalties_SR = _stacked([inputs.penalties.per_token[index] for index in indices])
        rewards_S = values_SR.new_tensor([sample.reward for sample in samples])
        rewards_SR = token_rewards(rewards_S, penalties_SR, mask_SR, 1.0) + _step_rewards(samples, mask_SR)
        found = generalized_advantages(rewards_SR, values_SR, mask_SR, settings.gamma, settings.gae_lambda)
        owned_S = torch.tensor([index in inputs.owned_samples for index in indices], device=mask_SR.device)
        owned_SR = mask_SR & owned_S[:, None]
        advantages_SR = found.advantages_BL
        statistics = {
            "critic/explained_variance": explained_variance(found.returns_BL, values_SR, owned_SR, _sum_data_parallel),
            "critic/return": float(spread(found.returns_BL, owned_SR, _sum_data_parallel).mean),
        }
        if settings.whiten_advantages:
            advantages_SR = whitened(advantages_SR, mask_SR, spread(advantages_SR, owned_SR, _sum_data_parallel))
        advantages, returns = (
            {index: at_positions(sample, row_R) for index, sample, row_R in zip(indices, samples, rows_SR, strict=True)}
            for rows_SR in (advantages_SR, found.returns_BL)
        )
        return RolloutAdvantages(advantages, ValueTargets(old_values, returns, statistics))


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    """[S, R], 0 beyond each part's end."""
    return torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True)


def _step_rewards(samples: Sequence[Sample], mask_SR: Tensor) -> Tensor:
    """Rewards of steps at the tokens that end them, [S, R]."""
    rewards_SR = torch.zeros(mask_SR.shape, device=mask_SR.device)
    for row_R, sample in zip(rewards_SR, samples, strict=True):
        for end, value in sample.steps:
            row_R[end] += value
    return rewards_SR * mask_SR


def _sum_data_parallel(mine: Tensor) -> Tensor:
    """Collective: added up over data-parallel ranks."""
    group = data_parallel_group()
    if group.size() > 1:
        mine = mine.clone()
        dist.all_reduce(mine, group=group)
    return mine
