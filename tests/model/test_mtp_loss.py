"""The chunked loss of multi-token prediction against megatron-core's, which has all logits at once."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from megatron.core.models.gpt import gpt_model
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper, process_mtp_loss

from megatron_r1.config.model import ModelConfig, MtpConfig
from megatron_r1.model.forward_backward import packed_seq_params
from megatron_r1.model.mtp_loss import mtp_loss, use_chunked_mtp_loss
from tests.support.float64 import DTYPE, float64
from tests.support.layouts import model_of
from tests.support.live_bytes import LiveBytes

ROWS, LENGTH = 3, 17


def shape_of(**changes) -> ModelConfig:
    """`tiny` without the balance loss, whose scale megatron-core keeps for the whole process."""
    shape = model_of("tiny")
    shape.moe.sequence_loss_coefficient = 0.0
    for name, value in changes.items():
        setattr(shape, name, value)
    return shape


@pytest.fixture
def in_float64(one_rank) -> Iterator[None]:
    with float64():
        yield


def gradients(model, compute, mask, packed: bool, monkeypatch) -> tuple[dict, torch.Tensor]:
    """Gradients of a training pass, and the recorded loss of each depth."""
    monkeypatch.setattr(gpt_model, "process_mtp_loss", compute)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(5, 500, (ROWS, LENGTH + 1), generator=generator)
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    positions, more = torch.arange(LENGTH).expand(ROWS, LENGTH), {}
    if packed:
        inputs, labels, positions = (x.reshape(1, -1) for x in (inputs, labels, positions))
        mask = None if mask is None else mask.reshape(1, -1)
        more = {"packed_seq_params": packed_seq_params(torch.arange(0, ROWS * LENGTH + 1, LENGTH).int())}
    MTPLossLoggingHelper.tracker = {}
    model.zero_grad()
    model(inputs, positions, None, labels=labels, loss_mask=mask, **more).mean().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    recorded = MTPLossLoggingHelper.tracker["loss_values"].clone()
    MTPLossLoggingHelper.tracker = {}
    return found, recorded


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_losses_and_gradients_are_megatron_cores(in_float64, new_model, monkeypatch, packed, masked, tied):
    model = new_model(shape_of(dtype=DTYPE, tied_embeddings=tied, mtp=MtpConfig(num_layers=2)))
    mask = (torch.rand(ROWS, LENGTH, generator=torch.Generator().manual_seed(2)) < 0.6).double() if masked else None
    expected, losses = gradients(model, process_mtp_loss, mask, packed, monkeypatch)
    found, chunked_losses = gradients(model, partial(mtp_loss, chunk_logits=512 * 7), mask, packed, monkeypatch)
    torch.testing.assert_close(chunked_losses, losses, rtol=1e-12, atol=0)
    assert found.keys() == expected.keys() and any("mtp" in name for name in found)
    for name, gradient in expected.items():
        if gradient.any():
            assert float((found[name] - gradient).norm() / gradient.norm()) < 1e-12, name


def test_models_compute_it_and_an_empty_mask_teaches_nothing(new_model, monkeypatch):
    use_chunked_mtp_loss()
    assert gpt_model.process_mtp_loss is mtp_loss
    model = new_model(shape_of())
    found, losses = gradients(model, mtp_loss, torch.zeros(ROWS, LENGTH), False, monkeypatch)
    assert not losses.any() and not any(found[name].any() for name in found if name.startswith("mtp."))


def test_logits_of_a_chunk_live_at_a_time(new_model, monkeypatch):
    """Those of all tokens are 64 MiB, and megatron-core holds them until the backward pass."""
    model, generator = new_model(shape_of(vocab_size=2**15)), torch.Generator().manual_seed(3)
    tokens = torch.randint(5, 500, (2, 257), generator=generator)
    inputs, labels, positions = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), torch.arange(256).expand(2, -1)
    most = {}
    for name, compute in {"all": process_mtp_loss, "chunks": partial(mtp_loss, chunk_logits=2**18)}.items():
        monkeypatch.setattr(gpt_model, "process_mtp_loss", compute)
        model.zero_grad()
        with LiveBytes([*model.parameters()]) as live:
            hidden = model(
                inputs, positions, None, labels=labels, output_processor=lambda hidden_states, **_: hidden_states
            )
            hidden.sum().backward()
        most[name] = live.most
    MTPLossLoggingHelper.tracker = {}
    print({name: f"{size / 2**20:.0f} MiB" for name, size in most.items()})
    assert most["all"] - most["chunks"] > 512 * 2**15 * 4 / 2  # at their most, both hold activations and gradients too
