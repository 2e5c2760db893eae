"""Aggregations of the values of tokens to one loss, in which papers differ, by name.

Pure. Each has a number per response and a divisor of the whole mini-batch, so that micro-batches add up.
Legend: B responses, L token positions, U is L, or 1 for values of whole responses.
"""

# ruff: noqa: F722 - shapes stand in annotations as text

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor


class BatchTotals(NamedTuple):
    """Sizes of a mini-batch, over all its micro-batches and ranks."""

    responses: int
    tokens: int = 0
    """Tokens that are trained on."""
    longest: int = 0
    """Length limit of a response, in tokens."""


class LossAggregation(NamedTuple):
    """Numbers per response, whose sum is divided by a number of the mini-batch."""

    per_response: Callable[[Tensor, Tensor], Tensor]
    """Values [B, U] and mask [B, L] -> [B]."""
    divisor: Callable[[BatchTotals], int]


def sequence_mean(values_BU: Float[Tensor, "B U"], mask_BL: Bool[Tensor, "B L"]) -> Float[Tensor, " B"]:
    """Mean over each response's tokens, 1/|o| sum_t; the value itself at sequence level; 0 for an empty response."""
    lengths_B1 = mask_BL.sum(dim=1, keepdim=True)
    if values_BU.shape[1] != mask_BL.shape[1]:
        return torch.where(lengths_B1 > 0, values_BU, 0.0).squeeze(1)
    return (torch.where(mask_BL, values_BU, 0.0) / lengths_B1.clamp(min=1)).sum(dim=1)


def sequence_sum(values_BU: Float[Tensor, "B U"], mask_BL: Bool[Tensor, "B L"]) -> Float[Tensor, " B"]:
    """Sum over each response's tokens; a value of the whole response counts once for each of them."""
    return torch.where(mask_BL, values_BU, 0.0).sum(dim=1)


LOSS_AGGREGATIONS: dict[str, LossAggregation] = {
    # 1/G sum_i 1/|o_i| sum_t (DeepSeekMath, equation 3): tokens of a long response count less.
    "sequence_mean": LossAggregation(sequence_mean, lambda totals: totals.responses),
    # 1/sum_i |o_i| sum_i sum_t (DAPO, equation 8): every token counts the same.
    "token_mean": LossAggregation(sequence_sum, lambda totals: max(totals.tokens, 1)),
    # 1/G sum_i 1/longest sum_t (Dr.GRPO, section 3.2): the same in every mini-batch, whatever its lengths.
    "constant": LossAggregation(sequence_sum, lambda totals: totals.responses * totals.longest),
}
