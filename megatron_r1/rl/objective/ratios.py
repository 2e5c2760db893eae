"""Probability ratios that cannot overflow, and the two levels at which they are taken.

Legend: B responses, L token positions, U positions at which a ratio is taken: L at token level, 1 at sequence level.
"""

# ruff: noqa: F722 - shapes stand in annotations as text

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

LEVELS = ("token", "sequence")

MAX_LOG_RATIO = 20.0
"""Above this the exponential is continued by its tangent: values and squared gradients stay finite in float32."""


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
