"""Generalized advantage estimation: rewards of tokens, advantages and returns, the critic's clipped loss.

Pure. The policy's loss is the objective `grpo` with advantages of tokens and the aggregation `token_mean` (PPO,
Schulman et al. 2017, equation 7). Legend: B responses, L token positions.
"""

# ruff: noqa: F722 - shapes stand in annotations as text

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor


class Estimates(NamedTuple):
    """Without gradient, 0 outside the mask."""

    advantages_BL: Tensor
    returns_BL: Tensor
    """The critic's targets: advantages + values."""


def token_rewards(
    rewards_B: Float[Tensor, " B"],
    penalties_BL: Float[Tensor, "B L"],
    mask_BL: Bool[Tensor, "B L"],
    kl_coefficient: float,
) -> Float[Tensor, "B L"]:
    """r_t = r - kl_coefficient x penalty_t: the response's reward at its last token (DeepSeekMath, equation 2)."""
    last_BL = mask_BL & (mask_BL.flip(1).cumsum(1).flip(1) == 1)
    rewards_BL = torch.where(last_BL, rewards_B[:, None], 0.0)
    return rewards_BL - kl_coefficient * torch.where(mask_BL, penalties_BL, 0.0)


def generalized_advantages(
    rewards_BL: Float[Tensor, "B L"],
    values_BL: Float[Tensor, "B L"],
    mask_BL: Bool[Tensor, "B L"],
    gamma: float = 1.0,
    gae_lambda: float = 1.0,
) -> Estimates:
    """A_t = sum_k (gamma lambda)^k delta_{t+k}, where delta_t = r_t + gamma V_{t+1} - V_t.

    Schulman et al. 2016, "High-Dimensional Continuous Control Using Generalized Advantage Estimation", equation 16.

    After the last token of the mask the value is 0; positions outside of it are skipped.

    Args:
        rewards_BL: of each token (`token_rewards`).
        values_BL: the critic's, of the state before each token.
        gamma, gae_lambda: with both at 1 the advantage is the return less the value.
    """
    rewards_BL, values_BL = (torch.where(mask_BL, x_BL.detach(), 0.0) for x_BL in (rewards_BL, values_BL))
    advantages_BL = torch.zeros_like(rewards_BL)
    next_value_B = following_B = torch.zeros_like(rewards_BL[:, 0])
    for t in reversed(range(rewards_BL.shape[1])):
        here_B = mask_BL[:, t]
        delta_B = rewards_BL[:, t] + gamma * next_value_B - values_BL[:, t]
        advantages_BL[:, t] = torch.where(here_B, delta_B + gamma * gae_lambda * following_B, 0.0)
        following_B = torch.where(here_B, advantages_BL[:, t], following_B)
        next_value_B = torch.where(here_B, values_BL[:, t], next_value_B)
    return Estimates(advantages_BL, torch.where(mask_BL, advantages_BL + values_BL, 0.0))


class Spread(NamedTuple):
    """Mean and variance of numbers that may be spread over ranks; NaN where there are none."""

    mean: Tensor
    variance: Tensor
    """Of the population: squares are divided by the count."""


Total = Callable[[Tensor], Tensor]
"""Sums over the ranks that have other responses."""


def spread(values_BL: Float[Tensor, "B L"], mask_BL: Bool[Tensor, "B L"], total: Total = lambda mine: mine) -> Spread:
    """Mean and variance of all numbers in the mask, in float64."""
    chosen = values_BL[mask_BL].double()
    count, sum_ = total(torch.stack([chosen.new_tensor(float(len(chosen))), chosen.sum()]))
    mean = sum_ / count
    return Spread(mean, total((chosen - mean).square().sum()) / count)


def whitened(
    values_BL: Float[Tensor, "B L"], mask_BL: Bool[Tensor, "B L"], over: Spread | None = None, epsilon: float = 1e-8
) -> Float[Tensor, "B L"]:
    """(value - mean) / standard deviation, 0 outside the mask; what PPO does to its advantages.

    Args:
        over: the spread of all tokens of the rollout; None is that of these.
    """
    mean, variance = over or spread(values_BL, mask_BL)
    scaled_BL = (values_BL.double() - mean) / (variance.sqrt() + epsilon)
    return torch.where(mask_BL, scaled_BL, 0.0).to(values_BL.dtype)


def explained_variance(
    returns_BL: Float[Tensor, "B L"],
    values_BL: Float[Tensor, "B L"],
    mask_BL: Bool[Tensor, "B L"],
    total: Total = lambda mine: mine,
) -> float:
    """1 - variance of (return - value) / variance of the return: 1 for a perfect critic, NaN for equal returns."""
    left, whole = (spread(x_BL, mask_BL, total).variance for x_BL in (returns_BL - values_BL, returns_BL))
    return float(1 - left / whole) if whole > 0 else math.nan


def critic_loss(
    values_BL: Float[Tensor, "B L"],
    old_values_BL: Float[Tensor, "B L"],
    returns_BL: Float[Tensor, "B L"],
    mask_BL: Bool[Tensor, "B L"],
    *,
    clip: float,
    num_tokens: int,
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """Half the mean over tokens of max((V - R)^2, (clip(V, V_old +- clip) - R)^2), and metrics.

    The clipping is of PPO's own implementation (Engstrom et al. 2020, "Implementation Matters in Deep RL", section 3).

    Args:
        old_values_BL: the critic's at the start of the rollout; no gradient flows into them, nor into returns.
        clip: how far a value may move in one rollout.
        num_tokens: of the whole mini-batch, so that micro-batches add up.
    """
    values_BL, old_BL, returns_BL = (
        torch.where(mask_BL, x_BL, 0.0) for x_BL in (values_BL, old_values_BL.detach(), returns_BL.detach())
    )
    clipped_BL = torch.clamp(values_BL, old_BL - clip, old_BL + clip)
    free_BL, bound_BL = (values_BL - returns_BL).square(), (clipped_BL - returns_BL).square()
    decided_BL = bound_BL > free_BL
    loss = 0.5 * torch.where(decided_BL, bound_BL, free_BL).sum() / num_tokens
    return loss, {
        "critic/loss": loss.detach().clone(),
        "critic/clip_fraction": decided_BL.sum() / num_tokens,
        "critic/value": values_BL.detach().sum() / num_tokens,
    }
