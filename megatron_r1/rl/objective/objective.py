"""The loss of reinforcement learning on padded answers: a policy term, an average, a penalty, a correction, by name.

Pure. Promises that the losses and metrics of micro-batches add up to those of their mini-batch, that padding never
reaches a value or a gradient, and that no probability ratio overflows. The parts are in `terms`, `averages`,
`penalties` and `correction`; the papers' objectives are what configs/rl/ makes of them.

Legend: B answers, L token positions, U positions at which the ratio is taken: L at token level, 1 at sequence level.
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
from megatron_r1.rl.objective.kl import ESTIMATORS, EXACT
from megatron_r1.rl.objective.policy_terms import PENALTY_LEVELS, TERMS, Clip
from megatron_r1.rl.objective.ratios import at_level


@dataclass(frozen=True)
class ObjectiveInputs:
    """Some answers of a mini-batch. What lies outside the mask may be anything, NaN too."""

    logprobs_BL: Float[Tensor, "B L"]
    """Log-probabilities of the answers' tokens under the policy that is trained."""
    old_logprobs_BL: Float[Tensor, "B L"]
    """The same under the policy that the ratio is taken to; no gradient flows into them."""
    advantages: Float[Tensor, " B"] | Float[Tensor, "B L"]
    """One per answer, or one per token."""
    mask_BL: Bool[Tensor, "B L"]
    """True at tokens of the answer."""
    reference_logprobs_BL: Float[Tensor, "B L"] | None = None
    """The same under the reference policy, for a penalty that is an estimate."""
    divergence_BL: Float[Tensor, "B L"] | None = None
    """KL(policy || reference) over the whole vocabulary at each token, for the exact penalty."""
    entropy_BL: Float[Tensor, "B L"] | None = None
    """The policy's entropy at each token, for the bonus."""
    rollout_logprobs_BL: Float[Tensor, "B L"] | None = None
    """The engine's log-probabilities, for the correction."""


@dataclass(frozen=True)
class ImportanceSampling:
    """Weights for the difference between trainer and engine."""

    kind: str
    level: str
    limits: ClipRange


@dataclass(frozen=True)
class Objective:
    """What is minimised: -(weight x term) + kl_coefficient x penalty - entropy_coefficient x entropy, averaged.

    Raises ValueError for a name that does not exist.
    """

    clip: Clip
    term: str = "grpo"
    """A key of `TERMS`."""
    average: str = "sequence_mean"
    """A key of `AVERAGES`; penalty and bonus are averaged likewise."""
    kl_coefficient: float = 0.0
    penalty: str = "k3"
    """A key of `ESTIMATORS`, or `exact`; taken at the level of the term's own paper."""
    entropy_coefficient: float = 0.0
    correction: ImportanceSampling | None = None

    def __post_init__(self) -> None:
        for field, value, allowed in (
            ("term", self.term, TERMS),
            ("average", self.average, LOSS_AGGREGATIONS),
            ("penalty", self.penalty, (*ESTIMATORS, EXACT)),
        ):
            if value not in allowed:
                raise ValueError(f"{field}={value}: must be one of {', '.join(allowed)}")

    def loss(self, answers: ObjectiveInputs, totals: BatchTotals) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """Loss and metrics of some answers: their sums divided by what the whole mini-batch holds.

        Adding up over micro-batches and ranks gives the mini-batch's.

        Args:
            totals: of the whole mini-batch, over all micro-batches and ranks.
        Returns:
            the loss, to be minimised, and metrics without gradient: `policy/loss` as it is averaged; and as means
            over responses of their tokens' means the other `policy/` metrics, and with a correction
            `mismatch/importance_weight` and `mismatch/importance_weight_clipped`.
        Raises:
            ValueError: something that a part needs is None.
        """
        mask_BL, average = answers.mask_BL, LOSS_AGGREGATIONS[self.average]
        pieces = TERMS[self.term](answers.logprobs_BL, answers.old_logprobs_BL, answers.advantages, mask_BL, self.clip)
        values_BU, metrics_B = pieces.objective, {}
        if self.correction:
            weighing = self._weights(answers, self.correction)
            values_BU = values_BU * weighing.values
            metrics_B["mismatch/importance_weight"] = sequence_mean(weighing.values, mask_BL)
            metrics_B["mismatch/importance_weight_clipped"] = sequence_mean(weighing.limited, mask_BL)
        loss_B = -average.per_answer(values_BU, mask_BL)
        kl_BU = self._penalty(answers)
        # Without the penalty the estimate is only looked at: 0 times its gradient could still be 0 times infinity.
        if kl_BU is not None and self.kl_coefficient:
            loss_B = self.kl_coefficient * average.per_answer(kl_BU, mask_BL) + loss_B
        if self.entropy_coefficient:
            if answers.entropy_BL is None:
                raise ValueError(f"entropy_coefficient={self.entropy_coefficient}: needs the policy's entropy")
            loss_B = loss_B - self.entropy_coefficient * average.per_answer(answers.entropy_BL, mask_BL)
        kl_B = torch.zeros_like(loss_B) if kl_BU is None else sequence_mean(kl_BU, mask_BL)
        metrics_B |= {
            "policy/ratio": sequence_mean(pieces.ratio, mask_BL),
            "policy/ratio_clipped": sequence_mean(pieces.ratio_clipped, mask_BL),
            "policy/advantage": _mean_advantage(answers),
            "policy/objective": sequence_mean(pieces.objective, mask_BL),
            "policy/kl_loss": self.kl_coefficient * kl_B,
            "policy/clip_fraction": sequence_mean(pieces.clipped, mask_BL),
            "policy/kl": kl_B,
        }
        loss = loss_B.sum() / average.divisor(totals)
        metrics = {name: value_B.detach().sum() / totals.answers for name, value_B in metrics_B.items()}
        return loss, metrics | {"policy/loss": loss.detach().clone()}

    def _penalty(self, answers: ObjectiveInputs) -> Tensor | None:
        """[B, U], None where there is nothing to compare with."""
        if self.penalty == EXACT:
            if answers.divergence_BL is None:
                if self.kl_coefficient:
                    raise ValueError("penalty=exact: needs the divergence over the whole vocabulary")
                return None
            return at_level(answers.divergence_BL, answers.mask_BL, PENALTY_LEVELS.get(self.term, "token"))
        if answers.reference_logprobs_BL is None:
            if self.kl_coefficient:
                raise ValueError(f"kl_coefficient={self.kl_coefficient}: needs log-probabilities of a reference policy")
            return None
        return penalty(
            self.penalty,
            answers.logprobs_BL,
            answers.reference_logprobs_BL,
            answers.mask_BL,
            PENALTY_LEVELS.get(self.term, "token"),
        )

    @staticmethod
    def _weights(answers: ObjectiveInputs, correction: ImportanceSampling) -> ImportanceWeights:
        if answers.rollout_logprobs_BL is None:
            raise ValueError(f"correction={correction.kind}: needs the engine's log-probabilities")
        return importance_weights(
            correction.kind,
            correction.level,
            answers.old_logprobs_BL,
            answers.rollout_logprobs_BL,
            answers.mask_BL,
            correction.limits,
        )


def penalty(
    name: str,
    logprobs_BL: Float[Tensor, "B L"],
    reference_logprobs_BL: Float[Tensor, "B L"],
    mask_BL: Bool[Tensor, "B L"],
    level: str = "token",
) -> Float[Tensor, "B U"]:
    """An estimate of KL(policy || reference) at a level; nothing flows back into the reference."""
    reference_BU = at_level(reference_logprobs_BL.detach(), mask_BL, level)
    return ESTIMATORS[name](at_level(logprobs_BL, mask_BL, level), reference_BU)


def _mean_advantage(answers: ObjectiveInputs) -> Tensor:
    if answers.advantages.dim() == 2:
        return sequence_mean(answers.advantages, answers.mask_BL)
    return torch.where(answers.mask_BL.any(dim=1), answers.advantages, 0.0)


def objective_of(config: RLConfig) -> Objective:
    """The configured objective. A penalty that is in the reward is not in the loss."""
    correction = config.importance_sampling
    limits = ClipRange(correction.low, correction.high)
    return Objective(
        Clip(config.clip_epsilon, config.clip_epsilon_high or config.clip_epsilon),
        config.objective,
        config.loss_aggregation,
        config.kl_coefficient if config.kl_placement == "loss" else 0.0,
        config.kl_estimator,
        config.entropy_coefficient,
        None if correction.kind == "none" else ImportanceSampling(correction.kind, correction.level, limits),
    )
