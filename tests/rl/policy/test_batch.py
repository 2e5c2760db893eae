"""Responses end to end: what the model reads, rows for the objective and back, scores as those of padded rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from megatron_r1.model.build import without_multi_token_prediction
from megatron_r1.model.replay import NOT_RECORDED, RoutingReplay
from megatron_r1.model.scores import head_weight, last_hidden_states, model_scores
from megatron_r1.model.vocab_parallel import ReferenceHidden
from megatron_r1.rl.policy.batch import make_batch, num_tokens
from megatron_r1.rl.policy.policy import FrozenLogProbs, Policy
from megatron_r1.rollout.routed_experts import narrowed
from megatron_r1.rollout.sample import Sample
from tests.support.float64 import DTYPE, float64
from tests.support.layouts import model_of
from tests.support.samples import make_sample, row_of

LENGTHS = ((4, 9), (1, 1), (7, 3), (2, 11), (6, 8))
PAD = 3


def samples_of(num_layers: int = 0, num_experts: int = 0) -> list[Sample]:
    """Drawn responses; every second one with recorded experts."""
    generator, chance = torch.Generator().manual_seed(7), np.random.default_rng(7)
    drawn = []
    for number, (prompt, response) in enumerate(LENGTHS):
        tokens = torch.randint(5, 60, (prompt + response,), generator=generator).tolist()
        log_probs = (-4 * torch.rand(response, generator=generator)).tolist()
        experts_TNK = chance.random((prompt + response - 1, num_layers, num_experts)).argsort(-1)[..., :2]
        drawn.append(
            make_sample(
                prompt_tokens=tuple(tokens[:prompt]), response_tokens=tuple(tokens[prompt:]), logprobs=tuple(log_probs),
                routed_experts=narrowed(experts_TNK) if num_experts and number % 2 else None,
            )
        )  # fmt: skip
    return [replace(drawn[0], in_loss=False), *drawn[1:]]


@pytest.mark.parametrize("multiple", [1, 4, 50])
def test_the_model_reads_responses_end_to_end_with_padding_once(multiple):
    samples, order = samples_of(), [3, 0, 1]
    batch = make_batch(samples, order, PAD, "cpu", multiple)
    whole = [row_of(samples[index])[0].tolist() for index in order]
    count = sum(len(tokens) - 1 for tokens in whole)
    padding = [PAD] * (batch.inputs_1T.shape[1] - count)
    assert batch.inputs_1T.shape[1] % multiple == 0 and len(padding) < multiple
    assert batch.inputs_1T[0].tolist() == [token for tokens in whole for token in tokens[:-1]] + padding
    assert batch.targets_1T[0].tolist() == [token for tokens in whole for token in tokens[1:]] + padding
    of_each = [range(len(tokens) - 1) for tokens in whole] + [range(len(padding))]
    assert batch.positions_1T[0].tolist() == [position for positions in of_each for position in positions]
    assert batch.bounds.tolist() == np.cumsum([0, *(len(one) for one in of_each if len(one))]).tolist()
    for row, index in enumerate(order):
        start, end = samples[index].prompt_length - 1, num_tokens(samples[index]) - 1
        in_loss = [samples[index].in_loss and start <= at < end for at in range(batch.mask_BL.shape[1])]
        assert batch.mask_BL[row].tolist() == in_loss
        assert batch.rollout_logprobs_BL[row, start:end].tolist() == samples[index].response.logprobs.tolist()
        assert not batch.rollout_logprobs_BL[row, :start].any() and not batch.rollout_logprobs_BL[row, end:].any()
    assert batch.mask_BL.shape[1] == max(num_tokens(samples[index]) - 1 for index in order)


def test_a_batch_beside_others_with_recorded_experts_says_that_it_has_none():
    """Routers in replay would take those of another batch."""
    samples = samples_of(num_layers=2, num_experts=4)
    batch = make_batch(samples, [0, 2], PAD, "cpu")
    assert batch.experts_1TNK.shape == (1, sum(batch.lengths), 2, 2) and (batch.experts_1TNK == NOT_RECORDED).all()
    assert make_batch(samples_of(), [0, 2], PAD, "cpu").experts_1TNK is None


def test_values_come_back_by_row_and_by_sample_with_their_gradients():
    batch = make_batch(samples_of(), [3, 0, 1], PAD, "cpu", 8)
    values_1T = torch.randn(batch.inputs_1T.shape, dtype=torch.float64, requires_grad=True)
    parts = values_1T[0].split([*batch.lengths, values_1T.shape[1] - sum(batch.lengths)])[:-1]
    rows_BL = batch.rows(values_1T)
    assert torch.equal(rows_BL, pad_sequence(list(parts), batch_first=True))
    weights_BL = torch.randn(rows_BL.shape, dtype=torch.float64)
    written = sum((part * weight_L[: len(part)]).sum() for part, weight_L in zip(parts, weights_BL, strict=True))
    gradients = (torch.autograd.grad(value, values_1T)[0] for value in ((rows_BL * weights_BL).sum(), written))
    torch.testing.assert_close(*gradients)
    found = batch.by_sample(values_1T)
    assert list(found) == [3, 0, 1] and torch.equal(batch.gather(found), rows_BL)
    hidden_1TD = torch.randn(*values_1T.shape, 2)
    again_1TD = batch.gather_end_to_end(batch.by_sample(hidden_1TD))
    assert torch.equal(again_1TD[:, : sum(batch.lengths)], hidden_1TD[:, : sum(batch.lengths)])
    assert again_1TD.shape == hidden_1TD.shape and not again_1TD[:, sum(batch.lengths) :].any()
    assert batch.gather({3: torch.tensor(1.0), 0: torch.tensor(2.0), 1: torch.tensor(3.0)}).tolist() == [1, 2, 3]


@pytest.fixture(scope="module")
def in_float64(one_rank) -> Iterator[None]:
    with float64():
        yield


@pytest.mark.parametrize("shape", ["tiny", "direct_query", "grouped"])
def test_scores_end_to_end_are_those_of_padded_rows(in_float64, new_model, shape):
    """Log-probs, entropy, exact divergence, replayed experts, and their gradients, in float64."""
    config = model_of(shape)
    config.dtype, moe = DTYPE, config.moe
    moe.sequence_loss_coefficient = 0.0
    model, other = new_model(config), new_model(config, seed=1)
    layers = config.num_layers - moe.first_dense_layers if moe.num_experts else 0
    replay = RoutingReplay(model, moe.first_dense_layers) if moe.num_experts else None
    samples, order = samples_of(layers, moe.num_experts), [3, 0, 1, 4, 2]
    batch = make_batch(samples, order, PAD, "cpu", 8)
    head_VD = head_weight(other).detach()
    hidden = Policy(other, 0.7).hidden_by_sample([batch])
    target = FrozenLogProbs(None, None, hidden, head_VD).reference_distribution(batch)
    scores = Policy(model, 0.7, replay).scores(model, batch, target)
    present_BL = batch.present_BL
    loss = sum(value_BL[present_BL].square().sum() for value_BL in scores)
    found = torch.autograd.grad(loss, [*model.parameters()], allow_unused=True)

    rows = [row_of(samples[index])[0] for index in order]
    inputs_BL = pad_sequence([row[:-1] for row in rows], batch_first=True, padding_value=PAD)
    targets_BL = pad_sequence([row[1:] for row in rows], batch_first=True, padding_value=PAD)
    positions_BL = torch.arange(inputs_BL.shape[1]).expand_as(inputs_BL)
    experts_BLNK = None
    if batch.experts_1TNK is not None:
        experts = batch.experts_1TNK[0, : sum(batch.lengths)].split(batch.lengths)
        experts_BLNK = pad_sequence(list(experts), batch_first=True, padding_value=NOT_RECORDED)
        assert (experts_BLNK != NOT_RECORDED).any()
    with torch.no_grad(), without_multi_token_prediction(other):
        hidden_BLD = last_hidden_states(other, inputs_BL, positions_BL)
    replay = replay or Policy(model, 1.0)._replay
    with replay.replaying(experts_BLNK, backward=True), without_multi_token_prediction(model):
        distribution = ReferenceHidden(hidden_BLD.transpose(0, 1), head_VD)
        padded = model_scores(model, inputs_BL, positions_BL, targets_BL, temperature=0.7, reference=distribution)
    replay.done()
    for value_BL, expected_BL in zip(scores, padded, strict=True):
        torch.testing.assert_close(value_BL[present_BL], expected_BL[present_BL], rtol=1e-12, atol=1e-12)
        assert not value_BL[~present_BL].any()
    loss = sum(value_BL[present_BL].square().sum() for value_BL in padded)
    expected = torch.autograd.grad(loss, [*model.parameters()], allow_unused=True)
    for gradient, wanted in zip(found, expected, strict=True):
        assert (gradient is None) == (wanted is None)
        if wanted is not None and wanted.any():
            assert float((gradient - wanted).norm() / wanted.norm()) < 1e-12
