"""Packed documents in training: masks against loops, isolation against documents alone, weights against one batch."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_r1.commands.pretrain import reader_of
from megatron_r1.config.data import DatasetConfig
from megatron_r1.config.run import RunConfig
from megatron_r1.data.pretraining.packed import PackedBatch, PackedCorpus
from megatron_r1.errors import ConfigError
from megatron_r1.train.packed import (
    PackedReader,
    attention_mask_of,
    loss_mask_of,
    mtp_loss_mask_of,
    positions_in_documents,
)
from tests.support.gradients import gradients_of, worst
from tests.support.layouts import model_of
from tests.support.packing_cases import one_piece_a_row, packed_batch

LENGTH = 32
BATCH = packed_batch(6, LENGTH)


@pytest.mark.parametrize("cross", [True, False])
@pytest.mark.parametrize("depth", [1, 2])
def test_masks_agree_with_loops(cross, depth):
    loss_mask_BL = loss_mask_of(BATCH, cross)
    mtp_loss_mask_BL = mtp_loss_mask_of(loss_mask_BL, depth)

    def step_counts(row, at):
        document_ids_L, begins_L = BATCH.document_ids_BL[row], BATCH.begins_BL[row]
        return document_ids_L[at + 1] != 0 and (
            document_ids_L[at] == document_ids_L[at + 1] or (cross and begins_L[at + 1])
        )

    for row in range(len(loss_mask_BL)):
        assert [step_counts(row, at) for at in range(LENGTH)] == loss_mask_BL[row].tolist()
        for at in range(LENGTH - depth):
            counts = all(step_counts(row, at + step) for step in range(depth + 1))
            assert mtp_loss_mask_BL[row, at + depth] == counts
    assert not mtp_loss_mask_BL[:, :depth].any() and 0 < mtp_loss_mask_BL.sum() < loss_mask_BL.sum() < loss_mask_BL.size


def test_attention_and_positions_stay_inside_a_piece():
    document_ids_BL = torch.from_numpy(BATCH.document_ids_BL[:, :-1])
    unseen_B1LL, positions_BL = attention_mask_of(document_ids_BL), positions_in_documents(document_ids_BL)
    for row, document_ids_L in enumerate(document_ids_BL.tolist()):
        for at, piece in enumerate(document_ids_L):
            attended = [other for other in range(at + 1) if document_ids_L[other] == piece]
            assert (~unseen_B1LL[row, 0, at]).nonzero().flatten().tolist() == attended
            assert positions_BL[row, at] == len(attended) - 1


@pytest.fixture
def plain(new_model):
    """A model without the loss that balances experts, which looks at whole rows, padding and all."""
    shape = model_of("tiny")
    shape.moe.sequence_loss_coefficient = 0.0
    return new_model(shape)


def test_isolated_documents_train_as_documents_alone(plain):
    reader, cross = PackedReader(False, 1, "cpu"), PackedReader(True, 1, "cpu")
    alone, alone_loss = gradients_of(plain, reader.micro_batches(one_piece_a_row(BATCH), 0, 1, 64), reader)
    packed, packed_loss = gradients_of(plain, reader.micro_batches(BATCH, 0, 1, 3), reader)
    mixed, mixed_loss = gradients_of(plain, cross.micro_batches(BATCH, 0, 1, 3), cross)
    print(
        f"largest relative difference of a gradient: {worst(packed, alone):.1e} isolated, {worst(mixed, alone):.1e} not"
    )
    assert packed_loss == pytest.approx(alone_loss, rel=1e-6) and worst(packed, alone) < 1e-5
    assert abs(mixed_loss - alone_loss) > 1e-4 and worst(mixed, alone) > 0.01


@pytest.mark.parametrize("cross", [True, False])
def test_micro_batches_and_ranks_do_not_change_the_gradient(plain, cross):
    reader = PackedReader(cross, 1, "cpu")
    counts = [int(loss_mask_of(BATCH, cross)[rows].sum()) for rows in (slice(0, 2), slice(2, 4), slice(4, 6))]
    assert len(set(counts)) == 3  # a mean of means would differ
    whole, loss = gradients_of(plain, reader.micro_batches(BATCH, 0, 1, 6), reader)
    for size in (1, 2, 4):
        found, found_loss = gradients_of(plain, reader.micro_batches(BATCH, 0, 1, size), reader)
        assert worst(found, whole) < 1e-5 and found_loss == pytest.approx(loss, rel=1e-6)
    shares = [gradients_of(plain, reader.micro_batches(BATCH, rank, 2, 2), reader) for rank in (0, 1)]
    mean = {name: (shares[0][0][name] + shares[1][0][name]) / 2 for name in whole}
    assert worst(mean, whole) < 1e-5
    assert (shares[0][1] + shares[1][1]) / 2 == pytest.approx(loss, rel=1e-6)


def test_padding_teaches_nothing(plain):
    reader = PackedReader(True, 1, "cpu")
    other = PackedBatch(BATCH.tokens_BL.copy(), BATCH.document_ids_BL, BATCH.begins_BL)
    other.tokens_BL[other.document_ids_BL == 0] = 4
    first, second = (gradients_of(plain, reader.micro_batches(batch, 0, 1, 3), reader) for batch in (BATCH, other))
    assert first[1] == pytest.approx(second[1], rel=1e-6) and worst(first[0], second[0]) < 1e-5
    embedding = first[0]["embedding.word_embeddings.weight"]
    assert not embedding[2].any() and embedding[BATCH.tokens_BL[0, 0]].any()


def test_full_sequences_of_one_document_train_like_a_stream(plain):
    from megatron_r1.train.stream import next_token_forward

    tokens_BL = np.random.default_rng(0).integers(5, 512, (4, LENGTH + 1))
    batch = PackedBatch(tokens_BL, np.ones_like(tokens_BL), np.zeros_like(tokens_BL, bool))
    stream, loss = gradients_of(
        plain, torch.from_numpy(tokens_BL).split(2), SimpleNamespace(forward=next_token_forward)
    )
    for cross in (True, False):
        reader = PackedReader(cross, 1, "cpu")
        found, found_loss = gradients_of(plain, reader.micro_batches(batch, 0, 1, 2), reader)
        assert worst(found, stream) < 1e-5 and found_loss == pytest.approx(loss, rel=1e-6)


def test_a_batch_without_targets_is_no_division_by_zero(plain):
    reader = PackedReader(False, 1, "cpu")
    empty = PackedBatch(BATCH.tokens_BL, np.zeros_like(BATCH.document_ids_BL), BATCH.begins_BL)
    gradients, loss = gradients_of(plain, reader.micro_batches(empty, 0, 1, 3), reader)
    assert loss == 0 and not any(gradient.any() for gradient in gradients.values())


def test_transformer_engine_cannot_isolate_and_says_so():
    config = RunConfig()
    config.data.indexed.datasets["a"] = DatasetConfig(path="a")
    this = SimpleNamespace(config=config, platform=SimpleNamespace(transformer_engine=True, device="cpu"))
    corpus = PackedCorpus([], [1.0], LENGTH, 0)
    assert isinstance(reader_of(this, corpus), PackedReader)
    config.data.indexed.cross_document_attention = False
    with pytest.raises(ConfigError, match="cross_document_attention=False: must be true with Transformer Engine"):
        reader_of(this, corpus)
