"""Estimators of KL(policy || reference), by name.

Pure. All are estimates from sampled tokens, in nats (Schulman 2020, "Approximating KL Divergence"). As a loss, k1's
gradient is zero on average: it is meant for the reward. `exact` sums over the whole vocabulary at each token
(`TokenScores.divergence`), which no function of two log-probabilities can.
"""

# ruff: noqa: F722 - shapes stand in annotations as text

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from megatron_r1.rl.objective.policy_terms import MAX_LOG_RATIO, at_level, ratio_of

EXACT = "exact"


def k1(logprobs: Float[Tensor, "*shape"], reference_logprobs: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """log(policy/reference): unbiased, of either sign (the penalty in the reward of DeepSeekMath, equation 2)."""
    return logprobs - reference_logprobs


def k2(logprobs: Float[Tensor, "*shape"], reference_logprobs: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Half the square of log(policy/reference): biased, never negative; its gradient is that of the true divergence."""
    return 0.5 * (logprobs - reference_logprobs).square()


def k3(logprobs: Float[Tensor, "*shape"], reference_logprobs: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """reference/policy - log(reference/policy) - 1: unbiased, never negative (DeepSeekMath, equation 4)."""
    log_ratio = reference_logprobs - logprobs
    # expm1 keeps the digits that exp(x) - 1 loses where the two policies are close.
    near = torch.expm1(log_ratio.clamp(max=MAX_LOG_RATIO)) - log_ratio
    return torch.where(log_ratio > MAX_LOG_RATIO, ratio_of(log_ratio) - 1 - log_ratio, near)


ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}


def estimate_kl(
    estimator: str,
    logprobs_BL: Float[Tensor, "B L"],
    reference_logprobs_BL: Float[Tensor, "B L"],
    mask_BL: Bool[Tensor, "B L"],
    level: str = "token",
) -> Float[Tensor, "B U"]:
    """An estimate of KL(policy || reference) of tokens or of whole responses; the reference gets no gradient."""
    reference_BU = at_level(reference_logprobs_BL.detach(), mask_BL, level)
    return ESTIMATORS[estimator](at_level(logprobs_BL, mask_BL, level), reference_BU)
