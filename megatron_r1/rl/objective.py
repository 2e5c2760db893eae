"""The objective of group relative policy optimization, on padded answers.

Pure. Promises that the losses and metrics of micro-batches add up to those of their mini-batch, that padding never
reaches a value or a gradient, and that no probability ratio overflows.

Legend: B answers, L token positions, U positions at which the ratio is taken: L at token level, 1 at sequence level.
"""

# ruff: noqa: F722 - shapes stand in annotations as text

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

LEVELS = ("token", "sequence")

MAX_LOG_RATIO = 20.0
"""Above this the exponential goes on as its tangent: values and squared gradients stay finite in float32."""


def ratio_of(log_ratio: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """exp(log_ratio), continued by its tangent above `MAX_LOG_RATIO`, so that the gradient keeps its sign."""
    return log_ratio.clamp(max=MAX_LOG_RATIO).exp() * (1 + (log_ratio - MAX_LOG_RATIO).relu())


def k3(logprobs: Float[Tensor, "*shape"], reference_logprobs: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The unbiased, never negative estimate of KL(policy || reference), in nats (DeepSeekMath, equation 4).

    reference/policy - log(reference/policy) - 1, from the log-probabilities of what the policy sampled.
    """
    log_ratio = reference_logprobs - logprobs
    # expm1 keeps the digits that exp(x) - 1 loses where the two policies are close.
    near = torch.expm1(log_ratio.clamp(max=MAX_LOG_RATIO)) - log_ratio
    return torch.where(log_ratio > MAX_LOG_RATIO, ratio_of(log_ratio) - 1 - log_ratio, near)


class Surrogate(NamedTuple):
    """The clipped objective in pieces, each [B, U]."""

    change_ratio: Tensor
    limited_change_ratio: Tensor
    smaller_of: Tensor
    clipped: Tensor
    """1 where the limit decided, else 0."""


def at_level(values_BL: Float[Tensor, "B L"], mask_BL: Bool[Tensor, "B L"], level: str) -> Float[Tensor, "B U"]:
    """Log-probabilities at the level of the ratio: of each token, or of the whole answer; 0 where there is no token."""
    if level not in LEVELS:
        raise ValueError(f"level={level}: must be one of {', '.join(LEVELS)}")
    values_BL = torch.where(mask_BL, values_BL, 0.0)
    return values_BL if level == "token" else values_BL.sum(dim=1, keepdim=True)


def answer_mean(values_BU: Float[Tensor, "B U"], mask_BL: Bool[Tensor, "B L"]) -> Float[Tensor, " B"]:
    """Mean over each answer's own tokens, 1/|o| sum_t; the value itself at sequence level; 0 for an empty answer."""
    lengths_B1 = mask_BL.sum(dim=1, keepdim=True)
    if values_BU.shape[1] != mask_BL.shape[1]:
        return torch.where(lengths_B1 > 0, values_BU, 0.0).squeeze(1)
    return (torch.where(mask_BL, values_BU, 0.0) / lengths_B1.clamp(min=1)).sum(dim=1)


def surrogate(log_ratio_BU: Float[Tensor, "B U"], advantages_B: Float[Tensor, " B"], epsilon: float) -> Surrogate:
    """min(ratio A, clip(ratio, 1 - epsilon, 1 + epsilon) A) and what it is made of (DeepSeekMath, equation 3)."""
    advantages_B1 = advantages_B[:, None]
    ratio_BU = ratio_of(log_ratio_BU)
    limited_BU = ratio_BU.clamp(1 - epsilon, 1 + epsilon)
    free_BU, bound_BU = ratio_BU * advantages_B1, limited_BU * advantages_B1
    smaller_BU = torch.where(bound_BU < free_BU, bound_BU, free_BU)
    return Surrogate(ratio_BU, limited_BU, smaller_BU, (bound_BU < free_BU).to(ratio_BU.dtype))


def clipped_objective(
    logprobs_BL: Float[Tensor, "B L"],
    old_logprobs_BL: Float[Tensor, "B L"],
    advantages_B: Float[Tensor, " B"],
    mask_BL: Bool[Tensor, "B L"],
    epsilon: float,
    level: str = "token",
) -> Float[Tensor, " B"]:
    """The clipped objective of each answer, to be maximised; its mean over answers is 1/G sum_i 1/|o_i| sum_t.

    Args:
        logprobs_BL: log-probabilities of the answers' tokens under the policy that is trained.
        old_logprobs_BL: the same under the policy that sampled them; no gradient flows into them.
        advantages_B: one per answer.
        mask_BL: true at tokens of the answer; what lies elsewhere may be anything, NaN too.
        epsilon: clip range. Above 1 the lower limit is idle (a ratio is positive): with 10, as in R1's first stage,
            only ratios above 11 of answers with a positive advantage are held back.
        level: `token` takes a ratio per token (DeepSeekMath, equation 3), `sequence` one of whole-answer
            probabilities (DeepSeek-V3 report, equation 26).
    Raises:
        ValueError: unknown level.
    """
    log_ratio_BU = at_level(logprobs_BL - old_logprobs_BL.detach(), mask_BL, level)
    return answer_mean(surrogate(log_ratio_BU, advantages_B, epsilon).smaller_of, mask_BL)


def grpo_loss(
    logprobs_BL: Float[Tensor, "B L"],
    old_logprobs_BL: Float[Tensor, "B L"],
    reference_logprobs_BL: Float[Tensor, "B L"] | None,
    advantages_B: Float[Tensor, " B"],
    mask_BL: Bool[Tensor, "B L"],
    *,
    num_answers: int,
    epsilon: float,
    kl_coefficient: float = 0.0,
    level: str = "token",
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """Loss and metrics of some answers of a mini-batch: their sums divided by the answers of the whole mini-batch.

    Adding up over micro-batches and ranks gives the mini-batch's means. Arguments are those of `clipped_objective`
    (`old_logprobs_BL` equal to `logprobs_BL` gives the on-policy objective: value A, gradient A grad log p), and

    Args:
        reference_logprobs_BL: log-probabilities under the reference policy; None where `kl_coefficient` is 0.
        num_answers: answers of the whole mini-batch, over all micro-batches and ranks.
        kl_coefficient: weight of the k3 penalty, which is taken at the level of the ratio.
    Returns:
        the loss, to be minimised, and metrics without gradient: `change_ratio`, `limited_change_ratio`, `advantage`,
        `smaller_of`, `stay_stable_part` (kl_coefficient * kl), `clip_fraction`, `kl`, `loss`.
    """
    if reference_logprobs_BL is None and kl_coefficient:
        raise ValueError(f"kl_coefficient={kl_coefficient}: needs log-probabilities of a reference policy")
    log_ratio_BU = at_level(logprobs_BL - old_logprobs_BL.detach(), mask_BL, level)
    pieces = surrogate(log_ratio_BU, advantages_B, epsilon)
    objective_B = answer_mean(pieces.smaller_of, mask_BL)
    kl_B = torch.zeros_like(objective_B)
    if reference_logprobs_BL is not None:
        reference_BU = at_level(reference_logprobs_BL.detach(), mask_BL, level)
        kl_B = answer_mean(k3(at_level(logprobs_BL, mask_BL, level), reference_BU), mask_BL)
    # Without the penalty the estimate is only looked at: 0 times its gradient could still be 0 times infinity.
    loss_B = kl_coefficient * kl_B - objective_B if kl_coefficient else -objective_B
    per_answer = {
        "change_ratio": answer_mean(pieces.change_ratio, mask_BL),
        "limited_change_ratio": answer_mean(pieces.limited_change_ratio, mask_BL),
        "advantage": torch.where(mask_BL.any(dim=1), advantages_B, 0.0),
        "smaller_of": objective_B,
        "stay_stable_part": kl_coefficient * kl_B,
        "clip_fraction": answer_mean(pieces.clipped, mask_BL),
        "kl": kl_B,
        "loss": loss_B,
    }
    metrics = {name: value_B.detach().sum() / num_answers for name, value_B in per_answer.items()}
    return loss_B.sum() / num_answers, metrics
