"""The KL penalty of reinforcement learning as one strategy: none, in the loss, or in tokens' rewards or advantages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_r1.config.rl import RLConfig
from megatron_r1.model.vocab_parallel import ReferenceHidden
from megatron_r1.parallel.comm import merge_by_key
from megatron_r1.parallel.mesh import is_last_stage, is_metrics_rank
from megatron_r1.rl.objective.kl import EXACT, estimate_kl
from megatron_r1.rl.policy.batch import PerSample, ResponseBatch, response_part
from megatron_r1.rl.policy.policy import FrozenLogProbs, Policy
from megatron_r1.rollout.sample import Sample, response_of


@dataclass(frozen=True)
class RewardPenalties:
    """The KL penalties in the rewards, or in the advantages, of a rollout."""

    per_token: PerSample
    """[R] of each of this rank's samples, whether it is trained on or not; empty except on the last pipeline stage."""
    per_sample: Tensor
    """The same summed over each response, [samples], on every rank."""


class KLPenalty(Protocol):
    """Where KL(policy || reference) enters the training signal."""

    @property
    def loss_coefficient(self) -> float:
        """Coefficient of the KL term of the loss."""
        ...

    def divergence_target(self, frozen: FrozenLogProbs, batch: ResponseBatch) -> ReferenceHidden | None:
        """The reference's distribution, where the loss needs the exact divergence to it."""
        ...

    def reward_penalties(
        self, samples: Sequence[Sample], policy: Policy, frozen: FrozenLogProbs, micro_batches: Sequence[ResponseBatch]
    ) -> RewardPenalties | None:
        """Collective, before the first update: the penalties in the rewards; None without any."""
        ...


class NoKLPenalty:
    """There is no reference policy."""

    loss_coefficient = 0.0

    def divergence_target(self, frozen: FrozenLogProbs, batch: ResponseBatch) -> ReferenceHidden | None:
        return None

    def reward_penalties(
        self, samples: Sequence[Sample], policy: Policy, frozen: FrozenLogProbs, micro_batches: Sequence[ResponseBatch]
    ) -> RewardPenalties | None:
        return None


class KLInLoss(NoKLPenalty):
    """The loss has a KL term (DeepSeekMath, equation 3)."""

    def __init__(self, coefficient: float):
        self.loss_coefficient = coefficient

    def divergence_target(self, frozen: FrozenLogProbs, batch: ResponseBatch) -> ReferenceHidden | None:
        return frozen.reference_distribution(batch) if is_last_stage() else None


class KLInReward(NoKLPenalty):
    """The reward of each token is lowered (DeepSeekMath, equation 2), or its advantage (Lu et al. 2025, Thinking
    Machines Lab, "On-Policy Distillation"); the advantage estimator decides which."""

    def __init__(self, coefficient: float, estimator: str):
        self._coefficient, self._estimator = coefficient, estimator

    def reward_penalties(
        self, samples: Sequence[Sample], policy: Policy, frozen: FrozenLogProbs, micro_batches: Sequence[ResponseBatch]
    ) -> RewardPenalties:
        per_token = {
            index: self._coefficient * values_R
            for index, values_R in self._divergence(samples, policy, frozen, micro_batches).items()
        }
        sums = {index: float(values_R.sum()) for index, values_R in per_token.items()}
        everyone = merge_by_key(sums if is_metrics_rank() else {})
        return RewardPenalties(per_token, torch.tensor([everyone[index] for index in range(len(samples))]))

    def _divergence(
        self, samples: Sequence[Sample], policy: Policy, frozen: FrozenLogProbs, micro_batches: Sequence[ResponseBatch]
    ) -> PerSample:
        """Collective: KL(policy || reference) at every token of a response, [R], in nats."""
        if self._estimator == EXACT:
            divergence = policy.divergence_by_sample(micro_batches, frozen.reference_distribution)
            return {index: response_part(samples[index], values_L) for index, values_L in divergence.items()}
        result: PerSample = {}
        for index, reference_L in (frozen.reference or {}).items():
            sample = samples[index]
            reference_1R = response_part(sample, reference_L)[None]
            old_1R = torch.from_numpy(response_of(sample).logprobs).to(reference_1R)[None]
            if frozen.old is not None:
                old_1R = response_part(sample, frozen.old[index])[None]
            mask_1R = torch.ones_like(old_1R, dtype=torch.bool)
            result[index] = estimate_kl(self._estimator, old_1R, reference_1R, mask_1R)[0]
        return result


def build_kl_penalty(config: RLConfig) -> KLPenalty:
    """The configured strategy."""
    if not config.kl_coefficient:
        return NoKLPenalty()
    if config.kl_placement == "loss":
        return KLInLoss(config.kl_coefficient)
    return KLInReward(config.kl_coefficient, config.kl_estimator)
