"""Batches of packed documents for tests of the model, made without files."""

from __future__ import annotations

import numpy as np

from megatron_r1.data.chat.batches import ChatBatch
from megatron_r1.data.pretraining.packed import PackedBatch

PAD = 2


def packed_batch(rows: int, length: int, seed: int = 0, longest: int = 12) -> PackedBatch:
    """Random pieces of 2 to `longest` tokens; most rows end in padding, some pieces continue a document."""
    chance = np.random.default_rng(seed)
    shape = (rows, length + 1)
    batch = PackedBatch(np.full(shape, PAD), np.zeros(shape, np.int64), np.zeros(shape, bool))
    for row in range(rows):
        at, number, end = 0, 0, int(chance.integers(length // 2, length + 2))
        while end - at >= 2:
            number += 1
            stop = min(end, at + int(chance.integers(2, longest + 1)))
            batch.tokens_BL[row, at:stop] = chance.integers(5, 512, stop - at)
            batch.document_ids_BL[row, at:stop] = number
            batch.begins_BL[row, at] = chance.random() < 0.7
            at = stop
    return batch


def one_piece_a_row(batch: PackedBatch) -> PackedBatch:
    """The same pieces, each alone in a row."""
    rows = [
        (tokens_L[document_ids_L == number], begins_L[document_ids_L == number])
        for tokens_L, document_ids_L, begins_L in zip(
            batch.tokens_BL, batch.document_ids_BL, batch.begins_BL, strict=True
        )
        for number in range(1, document_ids_L.max() + 1)
    ]
    shape = (len(rows), batch.tokens_BL.shape[1])
    result = PackedBatch(np.full(shape, PAD), np.zeros(shape, np.int64), np.zeros(shape, bool))
    for row, (tokens_L, begins_L) in enumerate(rows):
        result.tokens_BL[row, : len(tokens_L)] = tokens_L
        result.document_ids_BL[row, : len(tokens_L)] = 1
        result.begins_BL[row, : len(begins_L)] = begins_L
    return result


def chat_batch(rows: int, length: int, seed: int = 0, longest: int = 12) -> ChatBatch:
    """Random examples, each a prompt and then responses with prompts between them; most rows end in padding."""
    packed, chance = packed_batch(rows, length, seed, longest), np.random.default_rng([seed, 1])
    loss_mask_BL = np.zeros(packed.document_ids_BL.shape, bool)
    for row, document_ids_L in enumerate(packed.document_ids_BL):
        for number in range(1, document_ids_L.max() + 1):
            positions = np.flatnonzero(document_ids_L == number)
            loss_mask_BL[row, positions] = (chance.random(len(positions)) < 0.3).cumsum() % 2
            loss_mask_BL[row, positions[-1]], loss_mask_BL[row, positions[0]] = True, False
    return ChatBatch(packed.tokens_BL, packed.document_ids_BL, loss_mask_BL)


def one_example_a_row(batch: ChatBatch) -> ChatBatch:
    """The same examples, each alone in a row."""
    examples = [
        (row, number)
        for row, document_ids_L in enumerate(batch.document_ids_BL)
        for number in range(1, document_ids_L.max() + 1)
    ]
    shape = (len(examples), batch.tokens_BL.shape[1])
    result = ChatBatch(np.full(shape, PAD), np.zeros(shape, np.int64), np.zeros(shape, bool))
    for at, (row, number) in enumerate(examples):
        positions = batch.document_ids_BL[row] == number
        count = positions.sum()
        result.tokens_BL[at, :count] = batch.tokens_BL[row, positions]
        result.loss_mask_BL[at, :count] = batch.loss_mask_BL[row, positions]
        result.document_ids_BL[at, :count] = 1
    return result
