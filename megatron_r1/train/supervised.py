"""Supervised fine-tuning on packed examples: the loss is on answers alone, and no example sees another.

The loss of a step is the mean over the learned tokens of all its sequences, over all ranks and micro-batches. Padding
is routed like any token, but nothing comes of it: it is no target, no example attends to it, and post-training has
neither a balance loss nor steps of the balancing bias (`FROZEN`), the only places where its routing could count.

Shapes: B sequences, L positions; position t predicts token t + 1.
"""

from __future__ import annotations

import numpy as np

from megatron_r1.data.chat.batches import ChatBatch
from megatron_r1.train.packed import PackedReader


class SupervisedReader(PackedReader):
    """Turns batches of examples into micro-batches and runs the model on one."""

    def __init__(self, packed: bool, extra_predictions: int, device: str, trimmed_to: int = 0):
        """
        Args:
            packed: whether several examples share a sequence, and must be kept apart.
            extra_predictions: layers of multi-token prediction.
            trimmed_to: micro-batches end with their longest sequence, at a multiple of this; 0 leaves them whole.
        """
        # A sequence of one example needs no mask but the causal one: what comes after it is padding.
        super().__init__(not packed, extra_predictions, device)
        self._trimmed_to = trimmed_to

    def counted(self, batch: ChatBatch) -> np.ndarray:
        pieces_BL = batch.pieces_BL
        return (pieces_BL[:, 1:] == pieces_BL[:, :-1]) & batch.learned_BL[:, 1:]

    def shares(self, batch: ChatBatch, ranks: int) -> list[np.ndarray]:
        return balanced_shares(tokens_of(batch), ranks)

    def length(self, batch: ChatBatch, part: np.ndarray) -> int:
        whole = super().length(batch, part)
        if not self._trimmed_to:
            return whole
        longest = max(1, int(tokens_of(batch)[part].max()) - 1)
        return min(whole, -(-longest // self._trimmed_to) * self._trimmed_to)


def tokens_of(batch: ChatBatch) -> np.ndarray:
    """Tokens of each sequence without padding: int64 [B]."""
    return (batch.pieces_BL != 0).sum(1)


def balanced_shares(tokens_B: np.ndarray, ranks: int) -> list[np.ndarray]:
    """Sequences divided among ranks, equally many each and about as many tokens: the longest first, to who has least.

    A rank's own come from the longest to the shortest, so that those of one micro-batch are about as long.
    """
    shares: list[list[int]] = [[] for _ in range(ranks)]
    room, tokens = -(-len(tokens_B) // ranks), [0] * ranks
    for row in np.argsort(-tokens_B, kind="stable").tolist():
        rank = min((rank for rank in range(ranks) if len(shares[rank]) < room), key=lambda rank: tokens[rank])
        shares[rank].append(row)
        tokens[rank] += int(tokens_B[row])
    return [np.array(share, dtype=np.int64) for share in shares]


def packing_metrics(batch: ChatBatch, ranks: int) -> dict[str, float]:
    """What a step's batch holds, the same on every rank."""
    tokens_B = tokens_of(batch)
    tokens, slots = int(tokens_B.sum()), batch.pieces_BL.shape[0] * batch.pieces_BL.shape[1]
    of_ranks = [int(tokens_B[share].sum()) for share in balanced_shares(tokens_B, ranks)]
    return {
        "tokens": tokens,
        "examples": int(batch.pieces_BL.max(1).sum()),
        "packing_efficiency": tokens / slots,
        "padding_share": 1 - tokens / slots,
        "token_imbalance": max(of_ranks) * ranks / max(1, tokens) - 1,
    }
