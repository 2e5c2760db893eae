"""Next-token prediction on packed documents: the loss mask, the attention mask, and the weights of losses.

A loss is the mean over the targets in the loss mask of the whole global batch. Their number differs between
micro-batches and ranks, so the loss of a micro-batch is a sum with the weight of the global mean.

Shapes: B sequences, L positions; position t predicts token t + 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_r1.data.pretraining.packed import PackedBatch
from megatron_r1.model.forward_backward import LossFunction
from megatron_r1.parallel.context import context_parallel_group, positions_of, share_of_sequence


@dataclass(frozen=True)
class PackedMicroBatch:
    """A micro-batch of packed sequences."""

    tokens_BL: Tensor
    """Inputs, and one more token, a target only: [B, L + 1]."""
    document_ids_BL: Tensor
    """Number of the document, or piece of one, that each input belongs to; 0 is padding."""
    loss_mask_BL: Tensor
    """1 where the target is in the loss, else 0."""
    mtp_loss_mask_BL: Tensor
    """The loss mask of multi-token prediction, in megatron-core's form, times the weight of this micro-batch's mean:
    the mean over micro-batches and ranks is then the mean over all targets. In float64, as `weight` is."""
    weight: float
    """Weight of one target's loss, for the same purpose."""


class PackedReader:
    """Turns batches into micro-batches and runs the model on one."""

    def __init__(self, cross_document_attention: bool, mtp_layers: int, device: str):
        """
        Args:
            cross_document_attention: whether a token attends to the documents before its own in the sequence.
            mtp_layers: number of multi-token prediction layers.
        """
        self._cross, self._mtp_layers, self._device = cross_document_attention, mtp_layers, device

    def micro_batches(self, batch: Any, rank: int, ranks: int, size: int) -> list[PackedMicroBatch]:
        """This data-parallel rank's share of a global batch.

        Args:
            batch: a batch that `loss_mask` accepts.
            size: sequences of a micro-batch.
        """
        loss_mask_BL = self.loss_mask(batch)
        mtp_loss_mask_BL = mtp_loss_mask_of(loss_mask_BL, self._mtp_layers)
        share = self.shares(batch, ranks)[rank]
        parts = [share[start : start + size] for start in range(0, len(share), size)]
        means = len(parts) * ranks
        targets, mtp_targets = max(1, int(loss_mask_BL.sum())), max(1, int(mtp_loss_mask_BL.sum()))
        micro_batches = []
        for part in parts:
            length = self.length(batch, part)
            mtp_weight = means * int(mtp_loss_mask_BL[part].sum()) / mtp_targets
            micro_batches.append(
                PackedMicroBatch(
                    self._tensor(batch.tokens_BL[part, : length + 1]),
                    self._tensor(batch.document_ids_BL[part, :length]),
                    self._tensor(loss_mask_BL[part, :length]).float(),
                    self._tensor(mtp_loss_mask_BL[part, :length]).double() * mtp_weight,
                    means / targets,
                )
            )
        return micro_batches

    def loss_mask(self, batch: Any) -> np.ndarray:
        """Positions whose targets are in the loss: bool [B, L]."""
        return loss_mask_of(batch, self._cross)

    def shares(self, batch: Any, ranks: int) -> list[list[int]]:
        """Indices of each data-parallel rank's sequences, the same number for each."""
        indices = list(range(len(batch.tokens_BL)))
        return [indices[rank::ranks] for rank in range(ranks)]

    def length(self, batch: Any, part: Sequence[int]) -> int:
        """Inputs of a micro-batch of these sequences."""
        return int(batch.tokens_BL.shape[1]) - 1

    def forward(self, model: Any, batch: PackedMicroBatch) -> tuple[Tensor, LossFunction]:
        """Cross-entropy of the targets in the loss."""
        inputs_BL, labels_BL = batch.tokens_BL[:, :-1].contiguous(), batch.tokens_BL[:, 1:].contiguous()
        index_BL = positions_of(inputs_BL)
        loss_mask_BL, mtp_loss_mask_BL = batch.loss_mask_BL, batch.mtp_loss_mask_BL
        context_ranks = dist.get_world_size(context_parallel_group())
        if self._cross:
            inputs_BL, labels_BL, loss_mask_BL, mtp_loss_mask_BL, index_BL = map(
                share_of_sequence, (inputs_BL, labels_BL, loss_mask_BL, mtp_loss_mask_BL, index_BL)
            )
            positions_BL, mask_B1LL = index_BL, None
        else:
            positions_BL = positions_in_documents(batch.document_ids_BL)
            mask_B1LL = attention_mask_of(batch.document_ids_BL)

        def loss_function(output_BL: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            loss = (output_BL.float() * loss_mask_BL).sum() * batch.weight
            # Each context-parallel rank has a part of the sum, whereas logged values are averaged over ranks.
            return loss, {"train/loss": loss.detach() * context_ranks}

        output = model(inputs_BL, positions_BL, mask_B1LL, labels=labels_BL, loss_mask=mtp_loss_mask_BL)
        return output, loss_function

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device)


def loss_mask_of(batch: PackedBatch, cross_document_attention: bool) -> np.ndarray:
    """Positions whose targets are in the loss: bool [B, L].

    A target is in the loss if it follows its input in the same document. With cross-document attention the first token
    of the next document is in the loss too. The first token of a later piece of a cut document never is, because it was
    the last target of the piece before.
    """
    document_ids_BL = batch.document_ids_BL
    same_BL = document_ids_BL[:, 1:] == document_ids_BL[:, :-1]
    follows_BL = same_BL | batch.begins_BL[:, 1:] if cross_document_attention else same_BL
    return np.asarray(follows_BL & (document_ids_BL[:, 1:] != 0))


def mtp_loss_mask_of(loss_mask_BL: np.ndarray, depth: int) -> np.ndarray:
    """The loss mask to hand to megatron-core for `depth` extra predictions: bool [B, L].

    Prediction k at position t, of token t + 1 + k, reads the mask at t + k. It counts only if all targets from t to
    t + k are in the loss. The first `depth` entries are off, so that all depths have the same number of targets.
    """
    result_BL = loss_mask_BL.copy()
    for step in range(1, depth + 1):
        result_BL[:, step:] &= loss_mask_BL[:, :-step]
    result_BL[:, :depth] = False
    return result_BL


def positions_in_documents(document_ids_BL: Tensor) -> Tensor:
    """Position of each token within its document in the sequence, from 0."""
    index_BL = positions_of(document_ids_BL)
    first_BL = torch.ones_like(document_ids_BL, dtype=torch.bool)
    first_BL[:, 1:] = document_ids_BL[:, 1:] != document_ids_BL[:, :-1]
    return index_BL - torch.where(first_BL, index_BL, 0).cummax(1).values


def attention_mask_of(document_ids_BL: Tensor) -> Tensor:
    """Attention mask [B, 1, L, L], true where attention is forbidden: to later positions and to other documents."""
    length = document_ids_BL.shape[1]
    later_LL = torch.ones(length, length, dtype=torch.bool, device=document_ids_BL.device).triu(1)
    return (later_LL | (document_ids_BL[:, :, None] != document_ids_BL[:, None, :])).unsqueeze(1)
