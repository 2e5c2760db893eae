"""Distillation loss: the divergence from the teacher's most likely tokens at each position, not one target token.

Pure. The student's log-probabilities of those tokens come from `model.scores` with K targets at each position.

Shapes: T positions (any dimensions), K tokens of the teacher at each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_r1.config.sft import TAILS

LOWEST = -60.0
"""log of the smallest probability that the rest of a vocabulary is assigned."""


def _log_rest(log_probs_TK: Tensor) -> Tensor:
    """log(1 - sum_k p_k), bounded below where rounding leaves a probability of 0."""
    total_T = log_probs_TK.exp().sum(-1)
    return torch.log1p(-total_T.clamp(max=1 - torch.finfo(total_T.dtype).eps)).clamp(min=LOWEST)


def distillation_loss(
    log_probs_TK: Tensor, teacher_log_probs_TK: Tensor, tail: str = "rest", temperature: float = 1.0
) -> Tensor:
    """Divergence KL(teacher || student) at each position over the teacher's K tokens, [T], in nats; to be minimised.

    sum_k q_k (log q_k - log p_k) with teacher q and student p (Hinton et al. 2015, "Distilling the Knowledge in a
    Neural Network", equation 2 and section 2, whose gradients are scaled by the temperature squared).

    Args:
        log_probs_TK: student's log-probabilities of the K tokens, at `temperature`.
        teacher_log_probs_TK: the teacher's of the same tokens at the same temperature; no gradient flows into them.
        tail: treatment of the tokens beyond the K: `rest` adds one event for all of them together, so that the
            divergence is 0 only where student and teacher agree on all K probabilities; `renormalise` treats the K
            tokens as the whole vocabulary of both; `drop` leaves them out of the sum, which can then be below 0.
        temperature: of both distributions; the loss is multiplied by its square.
    Raises:
        ValueError: `tail` is not one of the three.
    """
    if tail not in TAILS:
        raise ValueError(f"tail={tail}: must be one of {', '.join(TAILS)}")
    teacher_TK, student_TK = teacher_log_probs_TK.detach(), log_probs_TK
    if tail == "renormalise":
        teacher_TK, student_TK = teacher_TK.log_softmax(-1), student_TK.log_softmax(-1)
    if tail == "rest":
        teacher_TK, student_TK = (
            torch.cat([x_TK, _log_rest(x_TK)[..., None]], -1) for x_TK in (teacher_TK, student_TK)
        )
    return (teacher_TK.exp() * (teacher_TK - student_TK)).sum(-1) * temperature**2
