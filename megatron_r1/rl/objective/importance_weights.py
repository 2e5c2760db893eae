"""Weights for answers that the engine sampled with other probabilities than the trainer's own, by name.

Pure. The weight is trainer/engine, of the same weights at the time of sampling or of newer ones, limited or masked so
that a rare token cannot dominate. It multiplies the policy term, and nothing flows back through it.

Sources: truncated importance sampling, Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL
Training"; masked, Liu et al. 2025, "When Speed Kills Stability", and at token level with both limits IcePop (Ant Ling
team 2025).

Legend: B answers, L token positions, U is L for weights of tokens, 1 for those of answers.
"""

# ruff: noqa: F722 - shapes stand in annotations as text

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from megatron_r1.rl.objective.ratios import at_level, ratio_of


class ClipRange(NamedTuple):
    """Least and largest weight."""

    low: float
    high: float


class ImportanceWeights(NamedTuple):
    """Weights, each [B, U]."""

    values: Tensor
    limited: Tensor
    """1 where the limits changed the weight, else 0."""


def truncated(ratio_BU: Float[Tensor, "B U"], limits: ClipRange) -> Float[Tensor, "B U"]:
    """Weights beyond a limit become the limit."""
    return ratio_BU.clamp(limits.low, limits.high)


def masked(ratio_BU: Float[Tensor, "B U"], limits: ClipRange) -> Float[Tensor, "B U"]:
    """Weights beyond a limit become 0: what is too far off is not learned from."""
    return torch.where((ratio_BU >= limits.low) & (ratio_BU <= limits.high), ratio_BU, 0.0)


CORRECTIONS: dict[str, Callable[[Tensor, ClipRange], Tensor]] = {"truncated": truncated, "masked": masked}


def importance_weights(
    name: str,
    level: str,
    logprobs_BL: Float[Tensor, "B L"],
    rollout_logprobs_BL: Float[Tensor, "B L"],
    mask_BL: Bool[Tensor, "B L"],
    limits: ClipRange,
) -> ImportanceWeights:
    """Weights of tokens, or of whole answers by the product over their tokens.

    Args:
        logprobs_BL: the trainer's own log-probabilities under the policy that the ratio's denominator is of.
        rollout_logprobs_BL: the engine's.
    """
    log_ratio_BU = at_level(logprobs_BL.detach() - rollout_logprobs_BL.detach(), mask_BL, level)
    ratio_BU = ratio_of(log_ratio_BU)
    values_BU = CORRECTIONS[name](ratio_BU, limits)
    return ImportanceWeights(values_BU, (values_BU != ratio_BU).to(values_BU.dtype))
