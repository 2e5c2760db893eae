"""Every epoch has each example once and whole, packed with other examples than before."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from megatron_r1.data.chat.batches import ChatBatches
from megatron_r1.data.chat.store import Examples

LENGTH, EPOCHS = 24, 3


def some_examples(count: int = 60, seed: int = 0) -> Examples:
    """Examples whose first token is their number; the loss mask excludes it and some later tokens."""
    chance = np.random.default_rng(seed)
    lengths_N = chance.integers(2, LENGTH + 2, count)
    tokens_T, loss_mask_T = chance.integers(1000, 2000, lengths_N.sum()), chance.random(lengths_N.sum()) < 0.6
    tokens_T[np.cumsum(lengths_N) - lengths_N] = np.arange(count)
    return Examples(tokens_T.astype(np.int32), loss_mask_T, lengths_N, chance.random(count) < 0.2, {})


def batches(packed: bool, examples: Examples, seed: int = 0) -> ChatBatches:
    return ChatBatches(examples, ~examples.eval_N, LENGTH, packed, EPOCHS, 9999, seed)


def contents(batch) -> list[list[tuple[list[int], list[bool]]]]:
    """Tokens and targets of each example of each sequence."""
    rows = zip(batch.tokens_BL, batch.document_ids_BL, batch.loss_mask_BL, strict=True)
    return [
        [(t[p == n].tolist(), flags[p == n].tolist()) for n in range(1, p.max(initial=0) + 1)] for t, p, flags in rows
    ]


@pytest.mark.parametrize("packed", [True, False])
def test_every_epoch_has_every_example_once_and_whole(packed):
    examples = some_examples()
    found = batches(packed, examples)
    starts = np.cumsum(examples.lengths_N) - examples.lengths_N
    orders = []
    for epoch in range(EPOCHS):
        rows = contents(found.batch(epoch * found.per_epoch, found.per_epoch))
        visited = [tokens[0] for row in rows for tokens, _ in row]
        assert sorted(visited) == np.flatnonzero(~examples.eval_N).tolist()
        for tokens, in_loss in (example for row in rows for example in row):
            at, length = starts[tokens[0]], examples.lengths_N[tokens[0]]
            assert tokens == examples.tokens_T[at : at + length].tolist()
            assert in_loss == [False, *examples.loss_mask_T[at + 1 : at + length].tolist()]
        assert all(len(row) == 1 for row in rows) or packed
        orders.append(rows)
    assert orders[0] != orders[1] != orders[2]
    if packed:
        company = [{frozenset(tokens[0] for tokens, _ in row) for row in rows if len(row) > 1} for rows in orders]
        assert len(company[0] & company[1]) < len(company[0]) / 2
        assert len(orders[0]) < len(visited) / 1.5


def test_a_position_determines_the_next_batch():
    examples = some_examples()
    whole = contents(batches(True, examples).batch(0, 60))
    for start, size in ((0, 7), (7, 20), (27, 33)):
        assert contents(batches(True, examples).batch(start, size)) == whole[start : start + size]
    assert contents(batches(True, examples, seed=1).batch(0, 60)) != whole


def test_after_the_last_epoch_come_empty_sequences():
    found = batches(True, some_examples())
    batch = found.batch(found.total - 1, 3)
    assert (batch.document_ids_BL.max(1) > 0).tolist() == [True, False, False]
    assert not batch.loss_mask_BL[1:].any() and (batch.tokens_BL[1:] == 9999).all()
    visited = Counter(len(row) for row in contents(found.batch(0, found.total + 5)))
    assert visited[0] == 5
    found.go_on_for(2)
    batch = found.batch(found.total - 1, 4)
    assert (batch.document_ids_BL.max(1) > 0).tolist() == [True, True, True, False]
