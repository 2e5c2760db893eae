"""The loss of reinforcement learning on padded responses: policy term, aggregation, KL term, importance weights.

Pure. The losses and metrics of micro-batches add up to those of their mini-batch, padding never affects a value or a
gradient, and no probability ratio overflows. The parts are in `policy_terms`, `aggregation`, `kl` and
`importance_weights`; configs/rl/ composes the papers' objectives from them.

Legend: B responses, L token positions, U positions at which the ratio is taken: L at token level, 1 at sequence level.
"""

# ruff: noqa: F722 - shapes stand in annotations as text

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from megatron_r1.config.rl import RLConfig
from megatron_r1.rl.objective.aggregation import LOSS_AGGREGATIONS, BatchTotals, sequence_mean
from megatron_r1.rl.objective.importance_weights import ClipRange, ImportanceWeights, importance_weights
from megatron_r1.rl.objective.kl import ESTIMATORS, EXACT, estimate_kl
from megatron_r1.rl.objective.policy_terms import KL_LEVELS, TERMS, Clip, at_level


@dataclass(frozen=True)
class ObjectiveInputs:
    """A micro-batch of responses. Values outside the mask may be anything, even NaN."""

    logprobs_BL: Float[Tensor, "B L"]
    """Log-probabilities of the response tokens under the policy that is trained."""
    old_logprobs_BL: Float[Tensor, "B L"]
    """The same under the old policy, the ratio's denominator; no gradient flows into them."""
    advantages: Float[Tensor, " B"] | Float[Tensor, "B L"]
    """One per response, or one per token."""
    mask_BL: Bool[Tensor, "B L"]
    """Loss mask: True at response tokens that are trained on."""
    reference_logprobs_BL: Float[Tensor, "B L"] | None = None
    """The same under the reference policy, for an estimated KL term."""
    divergence_BL: Float[Tensor, "B L"] | None = None
    """KL(policy || reference) over the whole vocabulary at each token, for the exact KL term."""
    entropy_BL: Float[Tensor, "B L"] | None = None
    """The policy's entropy at each token, for the entropy bonus."""
    rollout_logprobs_BL: Float[Tensor, "B L"] | None = None
    """The engine's log-probabilities, for importance weights."""


@dataclass(frozen=True)
class ImportanceSampling:
    """Importance weights for the difference between trainer and engine."""

    kind: str
    level: str
    clip_range: ClipRange


@dataclass(frozen=True)
class Objective:
    """The loss: -(weight x term) + kl_coefficient x KL - entropy_coefficient x entropy, aggregated.

    Raises ValueError for a name that does not exist.
    """

    clip: Clip
    term: str = "grpo"
    """A key of `TERMS`."""
    aggregation: str = "sequence_mean"
    """A key of `LOSS_AGGREGATIONS`; for the KL term and the entropy bonus too."""
    kl_coefficient: float = 0.0
    kl_estimator: str = "k3"
    """A key of `ESTIMATORS`, or `exact`; taken at the level of the term's own paper."""
    entropy_coefficient: float = 0.0
    importance_sampling: ImportanceSampling | None = None

    def __post_init__(self) -> None:
        for field, value, allowed in (
            ("term", self.term, TERMS),
            ("aggregation", self.aggregation, LOSS_AGGREGATIONS),
            ("kl_estimator", self.kl_estimator, (*ESTIMATORS, EXACT)),
        ):
            if value not in allowed:
                raise ValueError(f"{field}={value}: must be one of {', '.join(allowed)}")

    def loss(self, inputs: ObjectiveInputs, totals: BatchTotals) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """Loss and metrics of a micro-batch: its sums divided by the totals of the whole mini-batch.

        Adding up over micro-batches and ranks gives the mini-batch's.

        Args:
            totals: of the whole mini-batch, over all micro-batches and ranks.
        Returns:
            the loss, to be minimised, and metrics without gradient: `policy/loss` as it is aggregated; and as means
            over responses of their tokens' means the other `policy/` metrics, and with importance sampling
            `mismatch/importance_weight` and `mismatch/importance_weight_clipped`.
        Raises:
            ValueError: an input that a part needs is None.
        """
        mask_BL, aggregation = inputs.mask_BL, LOSS_AGGREGATIONS[self.aggregation]
        surrogate = TERMS[self.term](inputs.logprobs_BL, inputs.old_logprobs_BL, inputs.advantages, mask_BL, self.clip)
        values_BU, metrics_B = surrogate.objective, {}
        if self.importance_sampling:
            weights = self._importance_weights(inputs, self.importance_sampling)
            values_BU = values_BU * weights.values
            metrics_B["mismatch/importance_weight"] = sequence_mean(weights.values, mask_BL)
            metrics_B["mismatch/importance_weight_clipped"] = sequence_mean(weights.clipped, mask_BL)
        loss_B = -aggregation.per_response(values_BU, mask_BL)
        kl_BU = self._kl(inputs)
        # With a coefficient of 0 the estimate is only a metric: 0 times its gradient could be 0 times infinity.
        if kl_BU is not None and self.kl_coefficient:
            loss_B = self.kl_coefficient * aggregation.per_response(kl_BU, mask_BL) + loss_B
        if self.entropy_coefficient:
            if inputs.entropy_BL is None:
                raise ValueError(f"entropy_coefficient={self.entropy_coefficient}: needs the policy's entropy")
            loss_B = loss_B - self.entropy_coefficient * aggregation.per_response(inputs.entropy_BL, mask_BL)
        kl_B = torch.zeros_like(loss_B) if kl_BU is None else sequence_mean(kl_BU, mask_BL)
        metrics_B |= {
            "policy/ratio": sequence_mean(surrogate.ratio, mask_BL),
            "policy/ratio_clipped": sequence_mean(surrogate.ratio_clipped, mask_BL),
            "policy/advantage": _mean_advantage(inputs),
            "policy/objective": sequence_mean(surrogate.objective, mask_BL),
            "policy/kl_loss": self.kl_coefficient * kl_B,
            "policy/clip_fraction": sequence_mean(surrogate.clipped, mask_BL),
            "policy/kl": kl_B,
        }
        loss = loss_B.sum() / aggregation.divisor(totals)
        metrics = {name: value_B.detach().sum() / totals.responses for name, value_B in metrics_B.items()}
        return loss, metrics | {"policy/loss": loss.detach().clone()}

    def _kl(self, inputs: ObjectiveInputs) -> Tensor | None:
        """KL(policy || reference), [B, U]; None without a reference."""
        if self.kl_estimator == EXACT:
            if inputs.divergence_BL is None:
                if self.kl_coefficient:
                    raise ValueError("kl_estimator=exact: needs the divergence over the whole vocabulary")
                return None
            return at_level(inputs.divergence_BL, inputs.mask_BL, KL_LEVELS.get(self.term, "token"))
        if inputs.reference_logprobs_BL is None:
            if self.kl_coefficient:
                raise ValueError(f"kl_coefficient={self.kl_coefficient}: needs log-probabilities of a reference policy")
            return None
        return estimate_kl(
            self.kl_estimator,
            inputs.logprobs_BL,
            inputs.reference_logprobs_BL,
            inputs.mask_BL,
            KL_LEVELS.get(self.term, "token"),
        )

    @staticmethod
    def _importance_weights(inputs: ObjectiveInputs, importance_sampling: ImportanceSampling) -> ImportanceWeights:
        if inputs.rollout_logprobs_BL is None:
            raise ValueError(f"importance_sampling={importance_sampling.kind}: needs the engine's log-probabilities")
        return importance_weights(
            importance_sampling.kind,
            importance_sampling.level,
            inputs.old_logprobs_BL,
            inputs.rollout_logprobs_BL,
            inputs.mask_BL,
            importance_sampling.clip_range,
        )


def _mean_advantage(inputs: ObjectiveInputs) -> Tensor:
    if inputs.advantages.dim() == 2:
        return sequence_mean(inputs.advantages, inputs.mask_BL)
    return torch.where(inputs.mask_BL.any(dim=1), inputs.advantages, 0.0)


def build_objective(config: RLConfig, kl_coefficient: float) -> Objective:
    """The configured objective.

    Args:
        kl_coefficient: of the loss; 0 where the KL penalty is in the reward.
    """
    sampling = config.importance_sampling
    clip_range = ClipRange(sampling.low, sampling.high)
    return Objective(
        Clip(config.clip_epsilon, config.clip_epsilon_high or config.clip_epsilon),
        config.objective,
        config.loss_aggregation,
        kl_coefficient,
        config.kl_estimator,
        config.entropy_coefficient,
        None if sampling.kind == "none" else ImportanceSampling(sampling.kind, sampling.level, clip_range),
    )
