"""What makes good answers likelier: the policy terms of the papers, by name, each to be maximised.

Pure. All take log-probabilities under the trained policy and under the one that sampled, advantages, mask and clip
limits. None lets padding reach a value or a gradient, and no ratio overflows.

Legend: B answers, L token positions, U positions at which the ratio is taken: L at token level, 1 at sequence level.
"""

# ruff: noqa: F722 - shapes stand in annotations as text

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from megatron_r1.rl.objective.ratios import at_level, ratio_of

Advantages = Float[Tensor, " B"] | Float[Tensor, "B L"]
"""One per answer, or one per token."""


class Clip(NamedTuple):
    """Limits of the ratio: 1 - low and 1 + high. A `low` of 1 or more never limits, a ratio being positive."""

    low: float
    high: float


class Surrogate(NamedTuple):
    """A term in pieces, each [B, U]."""

    ratio: Tensor
    ratio_clipped: Tensor
    objective: Tensor
    """What is maximised."""
    clipped: Tensor
    """1 where the limit decided, else 0."""


Term = Callable[[Tensor, Tensor, Tensor, Tensor, Clip], Surrogate]
"""Log-probabilities [B, L], those of the sampling policy [B, L], advantages [B] or [B, L], mask [B, L], limits."""


def per_position(advantages: Advantages, level: str) -> Float[Tensor, "B 1"] | Float[Tensor, "B L"]:
    """Advantages against [B, U]; tokens may have their own where the ratio is theirs.

    Raises:
        ValueError: advantages of tokens for a ratio of whole answers.
    """
    if advantages.dim() == 1:
        return advantages[:, None]
    if level == "sequence":
        raise ValueError("advantages: tokens have their own, and the ratio is one of whole answers: take gspo_token")
    return advantages


def surrogate(log_ratio_BU: Tensor, advantages_BU: Tensor, clip: Clip) -> Surrogate:
    """min(ratio A, clip(ratio, 1 - low, 1 + high) A) and what it is made of (DeepSeekMath, equation 3)."""
    ratio_BU = ratio_of(log_ratio_BU)
    limited_BU = ratio_BU.clamp(1 - clip.low, 1 + clip.high)
    free_BU, bound_BU = ratio_BU * advantages_BU, limited_BU * advantages_BU
    smaller_BU = torch.where(bound_BU < free_BU, bound_BU, free_BU)
    return Surrogate(ratio_BU, limited_BU, smaller_BU, (bound_BU < free_BU).to(ratio_BU.dtype))


def grpo(
    logprobs_BL: Float[Tensor, "B L"],
    old_logprobs_BL: Float[Tensor, "B L"],
    advantages: Advantages,
    mask_BL: Bool[Tensor, "B L"],
    clip: Clip,
) -> Surrogate:
    """A ratio per token (DeepSeekMath, equation 3; PPO, equation 7; with high above low DAPO, equation 10).

    With both limits at 10, as in R1's first stage, only ratios above 11 of tokens with a positive advantage are held
    back.
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
    """A ratio of whole-answer probabilities (DeepSeek-V3 report, equation 26; DeepSeek-R1, equation 1)."""
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

    Takes neither the sampling policy's log-probabilities nor limits.
    """
    ratio_BL = ratio_of(at_level(logprobs_BL - logprobs_BL.detach(), mask_BL, "token"))
    smaller_BL = ratio_BL * per_position(advantages, "token")
    return Surrogate(ratio_BL, ratio_BL, smaller_BL, torch.zeros_like(ratio_BL))


def _answer_log_ratio(logprobs_BL: Tensor, old_logprobs_BL: Tensor, mask_BL: Tensor) -> Tensor:
    """[B, 1]: mean over the answer's tokens of the log-ratio."""
    sum_B1 = at_level(logprobs_BL - old_logprobs_BL.detach(), mask_BL, "sequence")
    return sum_B1 / mask_BL.sum(dim=1, keepdim=True).clamp(min=1)


def gspo(
    logprobs_BL: Float[Tensor, "B L"],
    old_logprobs_BL: Float[Tensor, "B L"],
    advantages: Advantages,
    mask_BL: Bool[Tensor, "B L"],
    clip: Clip,
) -> Surrogate:
    """The geometric mean of an answer's token ratios (GSPO, Zheng et al. 2025, equations 5 to 7)."""
    log_ratio_B1 = _answer_log_ratio(logprobs_BL, old_logprobs_BL, mask_BL)
    return surrogate(log_ratio_B1, per_position(advantages, "sequence"), clip)


def gspo_token(
    logprobs_BL: Float[Tensor, "B L"],
    old_logprobs_BL: Float[Tensor, "B L"],
    advantages: Advantages,
    mask_BL: Bool[Tensor, "B L"],
    clip: Clip,
) -> Surrogate:
    """The same value at every token, the gradient of the token's own probability (GSPO, equations 13 and 14)."""
    answer_B1 = _answer_log_ratio(logprobs_BL, old_logprobs_BL, mask_BL).detach()
    own_BL = at_level(logprobs_BL - logprobs_BL.detach(), mask_BL, "token")
    return surrogate(answer_B1 + own_BL, per_position(advantages, "token"), clip)


def cispo(
    logprobs_BL: Float[Tensor, "B L"],
    old_logprobs_BL: Float[Tensor, "B L"],
    advantages: Advantages,
    mask_BL: Bool[Tensor, "B L"],
    clip: Clip,
) -> Surrogate:
    """A grad log p, weighted by the limited ratio: no token loses its gradient (MiniMax-M1 2025, equations 4, 5)."""
    ratio_BL = ratio_of(at_level(logprobs_BL - old_logprobs_BL, mask_BL, "token")).detach()
    limited_BL = ratio_BL.clamp(1 - clip.low, 1 + clip.high)
    value_BL = limited_BL * per_position(advantages, "token") * torch.where(mask_BL, logprobs_BL, 0.0)
    return Surrogate(ratio_BL, limited_BL, value_BL, (limited_BL != ratio_BL).to(ratio_BL.dtype))


TERMS: dict[str, Term] = {
    "grpo": grpo,
    "grpo_sequence": grpo_sequence,
    "on_policy": on_policy,
    "gspo": gspo,
    "gspo_token": gspo_token,
    "cispo": cispo,
}
PENALTY_LEVELS = {"grpo_sequence": "sequence"}
"""Terms whose penalty is one of whole answers too (DeepSeek-V3 report, equation 27); others take it of tokens."""
