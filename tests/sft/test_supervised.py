"""Packed fine-tuning: the gradient of examples alone, no example sees another, ranks share the work evenly."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megatron_r1.data.chat.batches import ChatBatch
from megatron_r1.model.build import without_multi_token_prediction
from megatron_r1.sft.supervised import SupervisedReader, packing_metrics
from megatron_r1.train.routing import FROZEN
from tests.support.gradients import gradients_of, worst
from tests.support.layouts import model_of
from tests.support.packing_cases import chat_batch, one_example_a_row

LENGTH = 32
BATCH = chat_batch(6, LENGTH)
PACKED, ALONE = SupervisedReader(True, 1, "cpu"), SupervisedReader(False, 1, "cpu", trimmed_to=1)


@pytest.fixture(scope="module", params=["tiny", "tiny_dense"])
def model(request, new_model):
    """As fine-tuning treats it: the routers' balance is left alone."""
    model = new_model(model_of(request.param))
    FROZEN.apply(model, 0)
    return model


def test_packed_is_unpacked(model):
    alone, alone_loss = gradients_of(model, ALONE.micro_batches(one_example_a_row(BATCH), 0, 1, 1), ALONE)
    packed, packed_loss = gradients_of(model, PACKED.micro_batches(BATCH, 0, 1, 3), PACKED)
    print(f"loss {packed_loss / alone_loss - 1:.1e}, gradients {worst(packed, alone):.1e}")
    assert packed_loss == pytest.approx(alone_loss, rel=1e-6) and worst(packed, alone) < 5e-6


def test_loss_is_the_mean_over_tokens_in_the_loss_written_out(model):
    total, count = torch.zeros(()), 0
    rows = one_example_a_row(BATCH)
    model.zero_grad()
    for tokens_L, document_ids_L, loss_mask_L in zip(
        rows.tokens_BL, rows.document_ids_BL, rows.loss_mask_BL, strict=True
    ):
        tokens_1L = torch.from_numpy(tokens_L[document_ids_L != 0])[None]
        targets = np.flatnonzero(loss_mask_L)
        with without_multi_token_prediction(model):
            logits_LV = model(tokens_1L, torch.arange(tokens_1L.shape[1])[None], None)[0]
        total = total + F.cross_entropy(logits_LV[targets - 1], tokens_1L[0, targets], reduction="sum")
        count += len(targets)
    _, found = gradients_of(model, PACKED.micro_batches(BATCH, 0, 1, 2), PACKED)
    assert found == pytest.approx(float(total.detach()) / count, rel=1e-6)


@pytest.mark.parametrize("shape", ["tiny", "tiny_dense", "direct_query", "grouped_norm", "grouped_experts"])
def test_a_change_in_one_example_changes_no_other_by_a_bit(new_model, shape):
    config = model_of(shape)
    model = new_model(config)
    FROZEN.apply(model, 0)
    before = logits(model, BATCH, config.vocab_size)
    document_ids_BL = BATCH.document_ids_BL[:, :-1]
    for row, number in ((0, 1), (1, 2), (2, int(document_ids_BL[2].max()))):
        changed = ChatBatch(BATCH.tokens_BL.copy(), BATCH.document_ids_BL, BATCH.loss_mask_BL)
        positions = np.flatnonzero(document_ids_BL[row] == number)
        changed.tokens_BL[row, positions] = (changed.tokens_BL[row, positions] + 7) % config.vocab_size
        after = logits(model, changed, config.vocab_size)
        others = torch.from_numpy(document_ids_BL != 0)
        others[row, positions] = False
        assert not torch.equal(before[row, positions], after[row, positions])
        assert torch.equal(before[others], after[others])


def logits(model, batch, vocab_size):
    """By the reader's own call of the model, without the loss at its end."""
    [rows] = PACKED.micro_batches(
        ChatBatch(batch.tokens_BL % vocab_size, batch.document_ids_BL, batch.loss_mask_BL), 0, 1, 6
    )
    without_loss = model.register_forward_pre_hook(
        lambda module, args, named: (args, {**named, "labels": None, "loss_mask": None, "output_processor": None}),
        with_kwargs=True,
    )
    try:
        with torch.no_grad(), without_multi_token_prediction(model):
            shuffled_1TV, _ = PACKED.forward(model, rows)
    finally:
        without_loss.remove()
    [order] = PACKED.shares(batch, 1)
    shuffled_BLV = shuffled_1TV.view(6, LENGTH, -1)
    logits_BLV = torch.empty_like(shuffled_BLV)
    logits_BLV[torch.tensor(order)] = shuffled_BLV
    return logits_BLV


def test_ranks_and_micro_batches_do_not_change_the_gradient(model):
    whole, loss = gradients_of(model, PACKED.micro_batches(BATCH, 0, 1, 6), PACKED)
    counts = [int(PACKED.loss_mask(BATCH)[share].sum()) for share in PACKED.shares(BATCH, 2)]
    assert counts[0] != counts[1]  # a mean of means would differ
    shares = [gradients_of(model, PACKED.micro_batches(BATCH, rank, 2, 2), PACKED) for rank in (0, 1)]
    mean = {name: (shares[0][0][name] + shares[1][0][name]) / 2 for name in whole}
    assert worst(mean, whole) < 5e-6 and (shares[0][1] + shares[1][1]) / 2 == pytest.approx(loss, rel=1e-6)


def test_prompts_and_padding_teach_nothing(model):
    """Another token outside of the loss, to which no token in the loss attends: the same gradient to the last bit."""
    batch = chat_batch(4, LENGTH, seed=3)
    batch.loss_mask_BL[batch.document_ids_BL == 1] = False
    other = ChatBatch(batch.tokens_BL.copy(), batch.document_ids_BL, batch.loss_mask_BL)
    other.tokens_BL[other.document_ids_BL <= 1] = 4
    (first, loss), (second, same) = (
        gradients_of(model, PACKED.micro_batches(each, 0, 1, 2), PACKED) for each in (batch, other)
    )
    print(f"gradients {worst(second, first):.1e}")
    assert loss == same and worst(second, first) < 1e-6
    alone = gradients_of(model, ALONE.micro_batches(one_example_a_row(batch), 0, 1, 4), ALONE)
    assert alone[1] == pytest.approx(loss, rel=1e-6)


def test_unpacked_micro_batches_end_with_the_longest_example():
    rows = one_example_a_row(BATCH)
    reader = SupervisedReader(False, 1, "cpu", trimmed_to=4)
    widths = [part.tokens_BL.shape[1] for part in reader.micro_batches(rows, 0, 1, 5)]
    assert widths == sorted(widths, reverse=True) and widths[-1] < widths[0] <= 13
    assert all(width % 4 == 1 for width in widths)
    empty = ChatBatch(*(np.zeros_like(array) for array in (BATCH.tokens_BL, BATCH.document_ids_BL, BATCH.loss_mask_BL)))
    [part] = reader.micro_batches(empty, 0, 1, 6)
    assert part.tokens_BL.shape == (6, 5) and not part.loss_mask_BL.any()


def test_metrics_say_how_full_a_batch_is():
    found = packing_metrics(BATCH, 2)
    tokens = int((BATCH.document_ids_BL != 0).sum())
    assert found["train/tokens"] == tokens and found["train/examples"] == len(one_example_a_row(BATCH).tokens_BL)
    assert found["train/packing_efficiency"] == tokens / BATCH.document_ids_BL.size
    assert 0 <= found["train/token_imbalance"] < 0.2
