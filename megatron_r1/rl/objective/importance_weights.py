"""Importance weights for the difference between the engine's probabilities and the trainer's, by name.

Pure. The importance weight is trainer/engine, by the weights at the time of sampling or newer ones, truncated or masked
so that a rare token cannot dominate. It multiplies the policy term, and no gradient flows through it.

Sources: truncated importance sampling, Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL
Training"; masked, Liu et al. 2025, "When Speed Kills Stability", and at token level with both bounds IcePop (Ant Ling
team 2025).

Legend: B responses, L token positions, U is L for weights of tokens, 1 for those of responses.
"""

# ruff: noqa: F722 - shapes stand in annotations as text

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from megatron_r1.rl.objective.policy_terms import at_level, ratio_of


class ClipRange(NamedTuple):
    """Smallest and largest weight."""

    low: float
    high: float


class ImportanceWeights(NamedTuple):
    """Each [B, U]."""

    values: Tensor
    clipped: Tensor
    """1 where the range changed the weight, else 0."""


def truncated(ratio_BU: Float[Tensor, "B U"], clip_range: ClipRange) -> Float[Tensor, "B U"]:
    """Weights outside the range become its bound (TIS)."""
    return ratio_BU.clamp(clip_range.low, clip_range.high)


def masked(ratio_BU: Float[Tensor, "B U"], clip_range: ClipRange) -> Float[Tensor, "B U"]:
    """Weights outside the range become 0: those tokens are not trained on (MIS)."""
    return torch.where((ratio_BU >= clip_range.low) & (ratio_BU <= clip_range.high), ratio_BU, 0.0)


KINDS: dict[str, Callable[[Tensor, ClipRange], Tensor]] = {"truncated": truncated, "masked": masked}


def importance_weights(
    kind: str,
    level: str,
    logprobs_BL: Float[Tensor, "B L"],
    rollout_logprobs_BL: Float[Tensor, "B L"],
    mask_BL: Bool[Tensor, "B L"],
    clip_range: ClipRange,
) -> ImportanceWeights:
    """Weights of tokens, or of whole responses by the product over their tokens.

    Args:
        logprobs_BL: the trainer's own log-probabilities under the old policy.
        rollout_logprobs_BL: the engine's.
    """
    log_ratio_BU = at_level(logprobs_BL.detach() - rollout_logprobs_BL.detach(), mask_BL, level)
    ratio_BU = ratio_of(log_ratio_BU)
    values_BU = KINDS[kind](ratio_BU, clip_range)
    return ImportanceWeights(values_BU, (values_BU != ratio_BU).to(values_BU.dtype))
