"""Advantages less the KL penalty of each token, whatever the tokens after it.

With log(policy/teacher) at the sampled token as the penalty, the policy gradient is on average that of the divergence
KL(policy || teacher) at every token of the samples (Lu et al. 2025, Thinking Machines Lab, "On-Policy Distillation").
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from megatron_r1.rl.advantages.estimators import AdvantageEstimator, AdvantageInputs, RolloutAdvantages
from megatron_r1.rl.policy.batch import PerSample, at_positions


class PenalisedAdvantages:
    """Advantages of the rewards alone by another estimator; each token's is then lowered by its own penalty."""

    def __init__(self, of_rewards: AdvantageEstimator):
        self._of_rewards = of_rewards

    def estimate(self, inputs: AdvantageInputs) -> RolloutAdvantages:
        found = self._of_rewards.estimate(replace(inputs, penalties=None))
        if inputs.penalties is None:
            return found
        lowered: PerSample = {}
        for index, penalties_R in inputs.penalties.per_token.items():
            advantage: Tensor = found.by_sample[index].to(penalties_R)
            lowered[index] = advantage - at_positions(inputs.samples[index], penalties_R)
        return replace(found, by_sample=found.by_sample | lowered)
