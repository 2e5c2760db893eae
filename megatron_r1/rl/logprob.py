"""Log-probabilities of given tokens from vocabulary-parallel logits, without gathering them.

Shapes: B answers, L positions, V this rank's share of the vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _VocabularyParallelLogProbs(torch.autograd.Function):
    """log softmax at the target, and the entropy, over logits that tensor-parallel ranks share out."""

    @staticmethod
    def forward(
        context: Any, logits_BLV: Tensor, targets_BL: Tensor, first_row: int, group: dist.ProcessGroup
    ) -> tuple[Tensor, Tensor]:
        peak_BL = logits_BLV.amax(-1)
        dist.all_reduce(peak_BL, dist.ReduceOp.MAX, group)
        shifted_BLV = logits_BLV - peak_BL[..., None]
        exp_BLV = shifted_BLV.exp()
        local_BL = targets_BL - first_row
        mine_BL = (local_BL >= 0) & (local_BL < logits_BLV.shape[-1])
        local_BL = local_BL.where(mine_BL, 0)
        target_BL = shifted_BLV.gather(-1, local_BL[..., None])[..., 0].where(mine_BL, 0.0)
        sums = torch.stack([exp_BLV.sum(-1), (exp_BLV * shifted_BLV).sum(-1), target_BL])
        dist.all_reduce(sums, dist.ReduceOp.SUM, group)
        total_BL, weighted_BL, target_BL = sums
        probs_BLV = exp_BLV.div_(total_BL[..., None])
        context.save_for_backward(probs_BLV, local_BL, mine_BL)
        log_total_BL = total_BL.log()
        entropy_BL = log_total_BL - weighted_BL / total_BL
        context.mark_non_differentiable(entropy_BL)
        return target_BL - log_total_BL, entropy_BL

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        probs_BLV, local_BL, mine_BL = context.saved_tensors
        gradient_BL1 = gradients[0][..., None]
        result_BLV = probs_BLV * -gradient_BL1
        result_BLV.scatter_add_(-1, local_BL[..., None], gradient_BL1.where(mine_BL[..., None], 0.0))
        return result_BLV, None, None, None


def token_log_probs(
    logits_BLV: Tensor, targets_BL: Tensor, temperature: float, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target, and the entropy, under softmax(logits / temperature).

    Args:
        logits_BLV: [B, L, V], V being this rank's consecutive share of the vocabulary.
        targets_BL: token ids over the whole vocabulary.
        temperature: as the engine samples with; above 0.
        group: the tensor-parallel ranks, in vocabulary order.

    Returns:
        log-probabilities [B, L] in nats with gradient, entropy [B, L] in nats without, both fp32, alike on all ranks.
    """
    scaled_BLV = logits_BLV.float()
    if temperature != 1.0:
        scaled_BLV = scaled_BLV / temperature
    first_row = dist.get_rank(group) * logits_BLV.shape[-1]
    return _VocabularyParallelLogProbs.apply(scaled_BLV, targets_BL, first_row, group)
