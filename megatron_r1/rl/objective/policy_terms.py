"""The policy terms of the papers (surrogate objectives), by name, each to be maximised; and their probability ratios.

Pure. All take log-probabilities under the trained policy and under the old one, advantages, mask and clip range. None
lets padding reach a value or a gradient, and no ratio overflows.

Legend: B responses, L token positions, U positions at which the ratio is taken: L at token level, 1 at sequence level.
"""

# ruff: noqa: F722 - shapes stand in annotations as text

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

LEVELS = ("token", "sequence")

MAX_LOG_RATIO = 20.0
"""Above this the exponential is continued by its tangent: values and squared gradients stay finite in float32."""

Advantages = Float[Tensor, " B"] | Float[Tensor, "B L"]
"""One per response, or one per token."""


class Clip(NamedTuple):
    """The ratio's range: 1 - low to 1 + high. A `low` of 1 or more has no effect, since a ratio is positive."""

    low: float
    high: float


class Surrogate(NamedTuple):
    """A policy term and its parts, each [B, U]."""

    ratio: Tensor
    ratio_clipped: Tensor
    objective: Tensor
    """What is maximised: for most terms the smaller of the clipped and the unclipped product with the advantage."""
    clipped: Tensor
    """1 where clipping decided, else 0."""


Term = Callable[[Tensor, Tensor, Tensor, Tensor, Clip], Surrogate]
"""Log-probabilities [B, L], those of the old policy [B, L], advantages [B] or [B, L], mask [B, L], clip range."""


def ratio_of(log_ratio: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """exp(log_ratio), continued by its tangent above `MAX_LOG_RATIO`, so that the gradient keeps its sign."""
    return log_ratio.clamp(max=MAX_LOG_RATIO).exp() * (1 + (log_ratio - MAX_LOG_RATIO).relu())


def at_level(values_BL: Float[Tensor, "B L"], mask_BL: Bool[Tensor, "B L"], level: str) -> Float[Tensor, "B U"]:
    """Log-probabilities at the level of the ratio: of each token, or of the whole response; 0 outside the mask.

    Raises:
        ValueError: unknown level.
    """
    if level not in LEVELS:
        raise ValueError(f"level={level}: must be one of {', '.join(LEVELS)}")
    values_BL = torch.where(mask_BL, values_BL, 0.0)
    return values_BL if level == "token" else values_BL.sum(dim=1, keepdim=True)


def per_position(advantages: Advantages, level: str) -> Float[Tensor, "B 1"] | Float[Tensor, "B L"]:
    """Advantages that broadcast with [B, U]; tokens may have their own where the ratio is of tokens.

    Raises:
        ValueError: advantages of tokens with a ratio of whole responses.
    """
    if advantages.dim() == 1:
        return advantages[:, None]
    if level == "sequence":
        raise ValueError("advantages are of tokens, but the ratio is of whole responses: use gspo_token")
    return advantages


def surrogate(log_ratio_BU: Tensor, advantages_BU: Tensor, clip: Clip) -> Surrogate:
    """min(ratio A, clip(ratio, 1 - low, 1 + high) A) and its parts (DeepSeekMath, equation 3)."""
    ratio_BU = ratio_of(log_ratio_BU)
    clipped_BU = ratio_BU.clamp(1 - clip.low, 1 + clip.high)
    free_BU, bound_BU = ratio_BU * advantages_BU, clipped_BU * advantages_BU
    objective_BU = torch.where(bound_BU < free_BU, bound_BU, free_BU)
    return Surrogate(ratio_BU, clipped_BU, objective_BU, (bound_BU < free_BU).to(ratio_BU.dtype))


def grpo(
    logprobs_BL: Float[Tensor, "B L"],
    old_logprobs_BL: Float[Tensor, "B L"],
    advantages: Advantages,
    mask_BL: Bool[Tensor, "B L"],
    clip: Clip,
) -> Surrogate:
    """A ratio per token (DeepSeekMath, equation 3; PPO, equation 7; with high above low DAPO, equation 10).

    With low and high at 10, as in R1's first stage, only ratios above 11 with a positive advantage are clipped.
    """
    log_ratio_BL = at_level(logprobs_BL - old_logprobs_BL.detach(), mask_BL, "token")
    return surrogate(log_ratio_BL, per_position(advantages, "token"), clip)


def grpo_sequence(
    logprobs_BL: Float[Tensor, "B L"],
    old_logprobs_BL: Float[Tensor, "B L"],
    advantages: Advantages,
    mask_BL: Bool[Tensor, "B L"],
    clip: Clip,
) -> Surrogate:
    """A ratio of whole-response probabilities (DeepSeek-V3 report, equation 26; DeepSeek-R1, equation 1)."""
    log_ratio_B1 = at_level(logprobs_BL - old_logprobs_BL.detach(), mask_BL, "sequence")
    return surrogate(log_ratio_B1, per_position(advantages, "sequence"), clip)


def on_policy(
    logprobs_BL: Float[Tensor, "B L"],
    old_logprobs_BL: Float[Tensor, "B L"],
    advantages: Advantages,
    mask_BL: Bool[Tensor, "B L"],
    clip: Clip,
) -> Surrogate:
    """One update per rollout: value A, gradient A grad log p (DeepSeekMath, A.1.6, where the old policy is the policy).

    Uses neither the old policy's log-probabilities nor the clip range.
    """
    ratio_BL = ratio_of(at_level(logprobs_BL - logprobs_BL.detach(), mask_BL, "token"))
    objective_BL = ratio_BL * per_position(advantages, "token")
    return Surrogate(ratio_BL, ratio_BL, objective_BL, torch.zeros_like(ratio_BL))


def _mean_log_ratio(logprobs_BL: Tensor, old_logprobs_BL: Tensor, mask_BL: Tensor) -> Tensor:
    """[B, 1]: mean log-ratio of the response's tokens."""
    sum_B1 = at_level(logprobs_BL - old_logprobs_BL.detach(), mask_BL, "sequence")
    return sum_B1 / mask_BL.sum(dim=1, keepdim=True).clamp(min=1)


def gspo(
    logprobs_BL: Float[Tensor, "B L"],
    old_logprobs_BL: Float[Tensor, "B L"],
    advantages: Advantages,
    mask_BL: Bool[Tensor, "B L"],
    clip: Clip,
) -> Surrogate:
    """The geometric mean of a response's token ratios (GSPO, Zheng et al. 2025, equations 5 to 7)."""
    log_ratio_B1 = _mean_log_ratio(logprobs_BL, old_logprobs_BL, mask_BL)
    return surrogate(log_ratio_B1, per_position(advantages, "sequence"), clip)


def gspo_token(
    logprobs_BL: Float[Tensor, "B L"],
    old_logprobs_BL: Float[Tensor, "B L"],
    advantages: Advantages,
    mask_BL: Bool[Tensor, "B L"],
    clip: Clip,
) -> Surrogate:
    """The same value at every token, the gradient of the token's own probability (GSPO, equations 13 and 14)."""
    response_B1 = _mean_log_ratio(logprobs_BL, old_logprobs_BL, mask_BL).detach()
    own_BL = at_level(logprobs_BL - logprobs_BL.detach(), mask_BL, "token")
    return surrogate(response_B1 + own_BL, per_position(advantages, "token"), clip)


def cispo(
    logprobs_BL: Float[Tensor, "B L"],
    old_logprobs_BL: Float[Tensor, "B L"],
    advantages: Advantages,
    mask_BL: Bool[Tensor, "B L"],
    clip: Clip,
) -> Surrogate:
    """A grad log p, weighted by the clipped ratio: no token loses its gradient (MiniMax-M1 2025, equations 4, 5)."""
    ratio_BL = ratio_of(at_level(logprobs_BL - old_logprobs_BL, mask_BL, "token")).detach()
    clipped_BL = ratio_BL.clamp(1 - clip.low, 1 + clip.high)
    value_BL = clipped_BL * per_position(advantages, "token") * torch.where(mask_BL, logprobs_BL, 0.0)
    return Surrogate(ratio_BL, clipped_BL, value_BL, (clipped_BL != ratio_BL).to(ratio_BL.dtype))


TERMS: dict[str, Term] = {
    "grpo": grpo,
    "grpo_sequence": grpo_sequence,
    "on_policy": on_policy,
    "gspo": gspo,
    "gspo_token": gspo_token,
    "cispo": cispo,
}
KL_LEVELS = {"grpo_sequence": "sequence"}
"""Level of the KL term, where it is not of tokens (DeepSeek-V3 report, equation 27)."""
