"""The loss of multi-token prediction, by the chunked vocabulary-parallel scores that the main head's loss is made of.

megatron-core computes the logits of all tokens at once for every depth, and keeps them for the backward pass.

Shapes: L positions (of this rank, under sequence parallelism), B sequences, D width, V this rank's rows of the head.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import gpt_model
from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler, MTPLossLoggingHelper, roll_tensor
from torch import Tensor

from megatron_r1.model.lm_head import CHUNK_LOGITS, Head
from megatron_r1.model.scores import on_every_rank
from megatron_r1.model.vocab_parallel import score_tokens


def use_chunked_mtp_loss() -> None:
    """Let every `GPTModel` compute its loss of multi-token prediction by `mtp_loss`."""
    gpt_model.process_mtp_loss = mtp_loss


def mtp_loss(
    hidden_states: Tensor,
    labels: Tensor | None,
    loss_mask: Tensor | None,
    output_layer: Any,
    output_weight: Tensor | None,
    *,
    is_training: bool,
    config: Any,
    cp_group: dist.ProcessGroup,
    tp_group: dist.ProcessGroup,
    packed_seq_params: Any = None,
    chunk_logits: int = CHUNK_LOGITS,
    **_: Any,
) -> Tensor:
    """The backbone's hidden states [L, B, D]; their backward pass adds the gradient of the extra predictions' losses.

    The loss of depth k is the mean of -log p(token t + 1 + k) over the positions in the mask (DeepSeek-V3 report,
    equation 24, but for the constant), wherever context-parallel ranks hold them.

    Args:
        hidden_states: of the backbone and of each depth, one after the other along L.
        labels: token t + 1 at position t, [B, L]; without them there is no loss.
        loss_mask: read at t + k for depth k, [B, L]; None is everywhere. What is not 0 is in the mean, with the mask's
            number as its weight.
        output_weight: rows of the head [V, D] where they are the embedding's, else the output layer's own.
        is_training: whether the loss is recorded for the step's metrics.
        chunk_logits: as of `score_tokens`.
    """
    depths = config.mtp_num_layers
    hidden_LBD, *predicted = hidden_states.chunk(1 + depths)
    if labels is None:
        return hidden_LBD
    head = Head(output_layer.weight if output_weight is None else output_weight, tp_group)
    labels_BL, mask_BL = labels, torch.ones_like(labels) if loss_mask is None else loss_mask
    for depth, predicted_LBD in enumerate(predicted):
        labels_BL, mask_BL = (
            roll_tensor(x_BL, cp_group=cp_group, packed_seq_params=packed_seq_params)[0]
            for x_BL in (labels_BL, mask_BL)
        )
        scores = score_tokens(
            on_every_rank(predicted_LBD, output_layer), labels_BL.t(), head, chunk_logits=chunk_logits
        )
        losses_BL = -scores.log_probs.t() * mask_BL.to(scores.log_probs.dtype)
        losses_BL = losses_BL / _mean_over(cp_group, mask_BL.count_nonzero()).clamp(min=1)
        if is_training:
            _record(losses_BL.sum(), depth, depths)
        scaled_BL = losses_BL * (config.mtp_loss_scaling_factor / depths)
        hidden_LBD = MTPLossAutoScaler.apply(hidden_LBD, scaled_BL)
    return hidden_LBD


def _mean_over(group: dist.ProcessGroup, count: Tensor) -> Tensor:
    """Collective. The rank that holds a sequence's end predicts fewer tokens, which must not weigh more for it."""
    if group.size() == 1:
        return count
    count = count.double()
    dist.all_reduce(count, group=group)
    return count / group.size()


def _record(loss: Tensor, depth: int, depths: int) -> None:
    """For the step's metrics; megatron-core records how many predictions were right too, which nothing here reads."""
    unread = torch.zeros((), device=loss.device)
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    MTPLossLoggingHelper.save_metrics_to_tracker(loss.detach(), unread, unread, depth, depths, avg_group=group)
