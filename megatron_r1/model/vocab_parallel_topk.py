"""The K most likely tokens from hidden states, by a head shared out over tensor-parallel ranks, in chunks of tokens.

Shapes: D width, V this rank's rows of the head, C tokens of a chunk, K most likely tokens, k of them on this rank,
X = ranks x K.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_r1.model.lm_head import CHUNK_LOGITS, ChunkPlan, Head, chunk_plan


class TopKLogProbs(NamedTuple):
    """A model's most likely tokens, the most likely first, alike on all tensor-parallel ranks."""

    ids: Tensor
    """Token ids, int64 [*tokens, K]."""
    log_probs: Tensor
    """In nats, fp32 (float64 for float64 models): [*tokens, K]."""


@torch.no_grad()
def topk_logprobs(
    hidden: Tensor, head: Head, k: int, *, temperature: float = 1.0, chunk_logits: int = CHUNK_LOGITS
) -> TopKLogProbs:
    """The K most likely tokens under softmax(hidden head^T / temperature), without gradient.

    Of equally likely tokens the one with the lower id comes first, so that every layout finds the same. Ranks exchange
    only their own K best. Collective over `head.group`.

    Args:
        hidden: [*tokens, D], the same tokens on every rank of the group.
        k: at most the vocabulary size.
        temperature: logits are divided by it; above 0.
        chunk_logits: logits of this rank that may exist at once, at least one token's.
    Raises:
        ValueError: settings do not fit.
    """
    plan = chunk_plan(head, temperature, chunk_logits)
    if not 0 < k <= head.global_vocab_size:
        raise ValueError(f"k={k}: must be at least 1 and at most the {head.global_vocab_size} tokens of the vocabulary")
    hidden_TD = hidden.reshape(-1, hidden.shape[-1])
    # One chunk at the least, so that no tokens at all need no code of their own: every rank alike.
    chunks = list(plan.chunks(len(hidden_TD))) or [slice(0, 0)]
    parts = [_top_of_chunk(plan, plan.logits(hidden_TD[chunk], head.weight_VD), k) for chunk in chunks]
    return TopKLogProbs(*(torch.cat(part).view(*hidden.shape[:-1], k) for part in zip(*parts, strict=True)))


def _top_of_chunk(plan: ChunkPlan, logits_CV: Tensor, k: int) -> TopKLogProbs:
    """Of one chunk, [C, K] each; the buffer is used up."""
    values_CK, indices_CK = _greatest(logits_CV, min(k, logits_CV.shape[1]))
    lacking = (0, k - values_CK.shape[1])
    # What a rank lacks is less likely than any token of another one.
    values_CX = plan.gather(torch.nn.functional.pad(values_CK, lacking, value=-torch.inf))
    ids_CX = plan.gather(torch.nn.functional.pad(indices_CK + plan.head.vocab_start, lacking))
    # Ranks hold the vocabulary in order: a sort that keeps equals as they are keeps the lower id first.
    values_CK, order_CK = (x_CX[:, :k] for x_CX in values_CX.sort(dim=-1, descending=True, stable=True))
    peak_C1 = values_CK[:, :1]
    total_C = plan.reduce(logits_CV.sub_(peak_C1).exp_().sum(-1))
    return TopKLogProbs(ids_CX.gather(-1, order_CK), values_CK - peak_C1 - total_C.log()[:, None])


def _greatest(logits_CV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k greatest logits of each token and their indices, [C, k]: the greatest first, of equals the lower index."""
    values_Ck, indices_Ck = logits_CV.topk(k)
    if k:
        # Where equals lie on both sides of the cut, topk takes whichever it likes.
        least_C1 = values_Ck[:, -1:]
        split_C = (logits_CV == least_C1).sum(-1) > (values_Ck == least_C1).sum(-1)
        if split_C.any():
            indices_Ck[split_C] = logits_CV[split_C].sort(dim=-1, descending=True, stable=True).indices[:, :k]
    indices_Ck = indices_Ck.sort(-1).values
    values_Ck, order_Ck = logits_CV.gather(-1, indices_Ck).sort(dim=-1, descending=True, stable=True)
    return values_Ck, indices_Ck.gather(-1, order_Ck)
