"""Learning from a teacher's most likely words at each position, instead of from one sampled word.

Pure. The student's log-probabilities of those words come from `model.scores` with K targets at each position.

Shapes: T tokens (any dimensions), K words of the teacher.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_r1.config.sft import TAILS

LOWEST = -60.0
"""log of the least probability that the rest of a vocabulary is taken to have."""


def _log_rest(log_probs_TK: Tensor) -> Tensor:
    """log(1 - sum_k p_k), kept from minus infinity where rounding leaves nothing."""
    total_T = log_probs_TK.exp().sum(-1)
    return torch.log1p(-total_T.clamp(max=1 - torch.finfo(total_T.dtype).eps)).clamp(min=LOWEST)


def distillation_loss(
    log_probs_TK: Tensor, teacher_log_probs_TK: Tensor, tail: str = "rest", temperature: float = 1.0
) -> Tensor:
    """Divergence KL(teacher || student) of each token over the teacher's K words, [T], in nats; to be minimised.

    sum_k q_k (log q_k - log p_k) with teacher q and student p (Hinton et al. 2015, "Distilling the Knowledge in a
    Neural Network", equation 2 and section 2, whose gradients are scaled by the temperature squared).

    Args:
        log_probs_TK: student's log-probabilities of the K words, at `temperature`.
        teacher_log_probs_TK: the teacher's of the same words at the same temperature; no gradient flows into them.
        tail: what becomes of the words beyond the K: `rest` adds one event for all of them together, so that the
            divergence is 0 only where the student gives the K words what the teacher gives them; `renormalise` makes
            the K words of both the whole vocabulary; `drop` leaves the sum as it is, which can be below 0.
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
