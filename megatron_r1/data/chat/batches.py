"""Batches of packed examples, read by position.

A position is the number of sequences consumed since the start; it alone decides which sequence comes next. Every epoch
visits each example once and packs the examples anew, so that they share sequences with other examples than before. The
number of sequences is the same in every epoch, because best fit depends on lengths alone. Empty sequences after the
last epoch fill up the last batch.

Shapes: N examples, B sequences, L inputs of each; a sequence has L + 1 tokens, the last one a target only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_r1.data.chat.store import Examples
from megatron_r1.data.packing import Packing, pack


@dataclass(frozen=True, slots=True)
class ChatBatch:
    """Sequences of whole examples."""

    tokens_BL: np.ndarray
    """Token ids, padded on the right: int64 [B, L + 1]."""
    document_ids_BL: np.ndarray
    """Number of the example that each token belongs to, from 1 in each sequence; 0 is padding: int64."""
    loss_mask_BL: np.ndarray
    """Whether each token is a target: bool."""


class ChatBatches:
    """Batches of the chosen examples.

    Args:
        examples: tokenised.
        chosen_N: which of them: bool.
        sequence_length: inputs per sequence, L.
        packed: whether examples share a sequence.
        epochs: times that each is visited.
        pad: token that fills up a sequence.
        seed: of the order.
    """

    def __init__(
        self,
        examples: Examples,
        chosen_N: np.ndarray,
        sequence_length: int,
        packed: bool,
        epochs: int,
        pad: int,
        seed: int,
    ):
        self._examples, self._width, self._packed, self._pad, self._seed = (
            examples,
            sequence_length + 1,
            packed,
            pad,
            seed,
        )
        self._chosen = np.flatnonzero(chosen_N)
        self._start_N = np.cumsum(examples.lengths_N) - examples.lengths_N
        self._order: tuple[int, np.ndarray, Packing | None] = (-1, self._chosen, None)
        self.per_epoch = self._epoch(0)
        self.total = self.per_epoch * epochs
        """Sequences of all epochs."""
        self._last = self.total

    def go_on_for(self, sequences: int) -> None:
        """Have so many sequences of a further epoch after the last one, in the place of some that are left out."""
        self._last = self.total + sequences

    def batch(self, position: int, size: int) -> ChatBatch:
        """Sequences `position` to `position + size - 1`; those beyond the last one are empty."""
        shape = (size, self._width)
        batch = ChatBatch(np.full(shape, self._pad, np.int64), np.zeros(shape, np.int64), np.zeros(shape, bool))
        for row in range(size):
            if position + row < self._last:
                self._fill(position + row, batch.tokens_BL[row], batch.document_ids_BL[row], batch.loss_mask_BL[row])
        return batch

    def _fill(self, position: int, tokens_L: np.ndarray, document_ids_L: np.ndarray, loss_mask_L: np.ndarray) -> None:
        epoch, index = divmod(position, self.per_epoch)
        at = 0
        for number, example in enumerate(self._members(epoch, index), 1):
            start, length = int(self._start_N[example]), int(self._examples.lengths_N[example])
            tokens_L[at : at + length] = self._examples.tokens_T[start : start + length]
            loss_mask_L[at : at + length] = self._examples.loss_mask_T[start : start + length]
            loss_mask_L[at] = False  # nothing precedes it
            document_ids_L[at : at + length] = number
            at += length

    def _members(self, epoch: int, index: int) -> np.ndarray:
        """The examples of one sequence."""
        if self._order[0] != epoch:
            self._epoch(epoch)
        _, order_N, packing = self._order
        if packing is None:
            return order_N[index : index + 1]
        first, end = packing.first_piece_S[index : index + 2].tolist()
        return np.asarray(order_N[packing.document_P[first:end]])

    def _epoch(self, epoch: int) -> int:
        """Shuffle and pack the examples of an epoch; returns the number of its sequences."""
        chance = np.random.default_rng([self._seed, epoch])
        order_N = chance.permutation(self._chosen)
        if not self._packed:
            self._order = (epoch, order_N, None)
            return len(order_N)
        packing = pack(self._examples.lengths_N[order_N], self._width, int(chance.integers(2**62)))
        self._order = (epoch, order_N, _shuffled(packing, chance))
        return len(packing)


def _shuffled(packing: Packing, chance: np.random.Generator) -> Packing:
    """The same sequences in a random order."""
    order_S = chance.permutation(len(packing))
    counts_S = np.diff(packing.first_piece_S)
    pieces_P = np.concatenate(
        [np.arange(*packing.first_piece_S[at : at + 2].tolist()) for at in order_S] or [np.empty(0, np.int64)]
    )
    first_S = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts_S[order_S])])
    return Packing(packing.document_P[pieces_P], packing.start_P[pieces_P], packing.stop_P[pieces_P], first_S)
