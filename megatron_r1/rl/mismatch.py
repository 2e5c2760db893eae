"""Mismatch of trainer and engine: differences of their log-probabilities of sampled tokens, and when to warn.

Pure. Sums over tokens add up over micro-batches and ranks; `summary` makes metrics of them. Where the responses were
sampled with the trainer's current weights, all of it is a difference of two programs: kernels, precision, routing,
templates, weights that did not arrive. Legend: B responses, L token positions.
"""

# ruff: noqa: F722 - shapes stand in annotations as text

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from megatron_r1.config.rl import MismatchConfig
from megatron_r1.rl.objective.kl import k3
from megatron_r1.rl.objective.policy_terms import ratio_of

LARGEST = "mismatch/logprob_max_abs"
KEYS = (LARGEST, "mismatch/k1", "mismatch/k3", "mismatch/outside_range", "mismatch/tokens")


def mismatch_sums(
    logprobs_BL: Float[Tensor, "B L"],
    rollout_logprobs_BL: Float[Tensor, "B L"],
    mask_BL: Bool[Tensor, "B L"],
    low: float,
    high: float,
) -> dict[str, Tensor]:
    """Sums over tokens, and the largest difference.

    Args:
        low, high: ratios trainer/engine outside of these are counted, as importance sampling would clip them.
    Returns:
        `mismatch/logprob_max_abs`: largest |difference| in nats. Sums over tokens: `mismatch/k1`,
        log(engine/trainer); `mismatch/k3`, the never negative estimate of KL(engine || trainer);
        `mismatch/outside_range`; `mismatch/tokens`.
    """
    trainer_BL, rollout_BL = (x.detach().where(mask_BL, 0.0) for x in (logprobs_BL, rollout_logprobs_BL))
    ratio_BL = ratio_of(trainer_BL - rollout_BL)
    inside_BL = (ratio_BL >= low) & (ratio_BL <= high)
    return {
        "mismatch/logprob_max_abs": (trainer_BL - rollout_BL).abs().max(),
        "mismatch/k1": (rollout_BL - trainer_BL).sum(),
        "mismatch/k3": k3(rollout_BL, trainer_BL).sum(),
        "mismatch/outside_range": (mask_BL & ~inside_BL).sum().to(trainer_BL.dtype),
        "mismatch/tokens": mask_BL.sum().to(trainer_BL.dtype),
    }


def summary(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means over tokens, and the largest difference, of the sums of all micro-batches and ranks."""
    tokens = sum(part["mismatch/tokens"] for part in parts) or 1.0
    means = {
        key: sum(part[key] for part in parts) / tokens
        for key in ("mismatch/k1", "mismatch/k3", "mismatch/outside_range")
    }
    # max() passes over a NaN unless it comes first.
    gaps = torch.tensor([part["mismatch/logprob_max_abs"] for part in parts], dtype=torch.float64)
    return {"mismatch/logprob_max_abs": float(gaps.max()), **means}


def alarms(metrics: Mapping[str, float], thresholds: MismatchConfig) -> list[str]:
    """A warning for each threshold that a metric exceeds, or that a NaN cannot be compared with."""
    limits = {
        "mismatch/logprob_max_abs": thresholds.logprob_max_abs_warn,
        "mismatch/k3": thresholds.k3_warn,
        "mismatch/outside_range": thresholds.outside_range_warn,
    }
    return [
        f"{key}={metrics[key]:.3g} is above rl.{key.replace('/', '.')}_warn={limit:g}: trainer and engine disagree"
        for key, limit in limits.items()
        if limit and not metrics[key] <= limit
    ]
