"""Supervised fine-tuning on packed examples: the loss is on responses alone, and no example attends to another.

The loss of a step is the mean over the tokens in the loss of all its sequences, over all ranks and micro-batches.
Routers route padding like any token, but without effect: it is no target and no example attends to it. Its routing
could count only in a balance loss and in updates of the balancing bias, which `routing` leaves off by default.

Shapes: B sequences, L positions; position t predicts token t + 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_r1.data.chat.batches import ChatBatch
from megatron_r1.model.forward_backward import LossFunction, packed_seq_params
from megatron_r1.model.scores import model_scores
from megatron_r1.model.vocab_parallel import TokenScores
from megatron_r1.train.batching import divide_by_tokens
from megatron_r1.train.packed import PackedMicroBatch, PackedReader, positions_in_documents


class SupervisedReader(PackedReader):
    """Turns batches of examples into micro-batches and runs the model on one."""

    def __init__(self, packed: bool, mtp_layers: int, device: str, trimmed_to: int = 0):
        """
        Args:
            packed: whether several examples share a sequence, so that attention must not cross from one to another.
            mtp_layers: number of multi-token prediction layers.
            trimmed_to: micro-batches are cut after their longest sequence, at a multiple of this; 0 does not cut them.
        """
        # A sequence of one example needs no mask but the causal one: what comes after it is padding.
        super().__init__(True, mtp_layers, device)
        self._packed, self._trimmed_to = packed, trimmed_to

    def forward(self, model: Any, batch: PackedMicroBatch) -> tuple[Tensor, LossFunction]:
        """Cross-entropy of the tokens in the loss.

        Where examples share sequences, all sequences of the micro-batch are concatenated; attention, rotary positions
        and multi-token prediction get the boundaries of the examples. The logits of all tokens are never in memory at
        once.
        """
        if not self._packed:
            return super().forward(model, batch)

        def loss_function(output_1T: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            loss = (output_1T.float().view_as(batch.loss_mask_BL) * batch.loss_mask_BL).sum() * batch.weight
            return loss, {"train/loss": loss.detach()}

        output = self.run(model, batch, partial(model_scores, targets=batch.tokens_BL[:, 1:].reshape(1, -1)))
        return -output.log_probs if isinstance(output, TokenScores) else output, loss_function

    def run(self, model: Any, batch: PackedMicroBatch, query: Callable[..., Any]) -> Any:
        """Runs a function of `model.scores` on the concatenated examples; multi-token prediction adds its own loss."""
        inputs_1T, positions_1T, packed = end_to_end(batch)
        return query(
            model,
            inputs_1T,
            positions_1T,
            labels=batch.tokens_BL[:, 1:].reshape(1, -1),
            loss_mask=batch.mtp_loss_mask_BL.reshape(1, -1),
            packed_seq_params=packed,
        )

    def shape(self, length: int, sequences: int) -> tuple[int, int]:
        """Length and number of the model's input sequences for a micro-batch of `sequences` sequences."""
        return (length * sequences, 1) if self._packed else (length, sequences)

    def loss_mask(self, batch: ChatBatch) -> np.ndarray:
        document_ids_BL = batch.document_ids_BL
        return np.asarray((document_ids_BL[:, 1:] == document_ids_BL[:, :-1]) & batch.loss_mask_BL[:, 1:])

    def shares(self, batch: ChatBatch, ranks: int) -> list[list[int]]:
        return divide_by_tokens(tokens_of(batch).tolist(), ranks, equal_counts=True)

    def length(self, batch: ChatBatch, part: Sequence[int]) -> int:
        whole = super().length(batch, part)
        if not self._trimmed_to:
            return whole
        longest = max(1, int(tokens_of(batch)[part].max()) - 1)
        return min(whole, -(-longest // self._trimmed_to) * self._trimmed_to)


def end_to_end(batch: PackedMicroBatch) -> tuple[Tensor, Tensor, Any]:
    """Tokens and positions of all sequences concatenated, [1, T], and the boundaries of the examples for attention."""
    positions_BL = positions_in_documents(batch.document_ids_BL)
    tokens_1T, positions_1T = batch.tokens_BL[:, :-1].reshape(1, -1), positions_BL.reshape(1, -1)
    return tokens_1T, positions_1T, packed_seq_params(bounds(positions_BL))


def bounds(positions_BL: Tensor) -> Tensor:
    """First token of each example when sequences are concatenated, and the end of the last: int32 [N + 1].

    Padding at the end of a sequence counts as an example of its own.
    """
    flat_T = positions_BL.flatten()
    starts_N = (flat_T == 0).nonzero().flatten()
    return torch.cat([starts_N, starts_N.new_tensor([len(flat_T)])]).int()


def tokens_of(batch: ChatBatch) -> np.ndarray:
    """Tokens of each sequence without padding: int64 [B]."""
    return np.asarray((batch.document_ids_BL != 0).sum(1))


def packing_metrics(batch: ChatBatch, ranks: int) -> dict[str, float]:
    """Metrics of the contents of a step's batch, the same on every rank."""
    tokens_B = tokens_of(batch)
    tokens, slots = int(tokens_B.sum()), batch.document_ids_BL.shape[0] * batch.document_ids_BL.shape[1]
    of_ranks = [int(tokens_B[share].sum()) for share in divide_by_tokens(tokens_B.tolist(), ranks, equal_counts=True)]
    return {
        "train/tokens": tokens,
        "train/examples": int(batch.document_ids_BL.max(1).sum()),
        "train/packing_efficiency": tokens / slots,
        "train/token_imbalance": max(of_ranks) * ranks / max(1, tokens) - 1,
    }
