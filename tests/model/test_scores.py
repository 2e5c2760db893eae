"""A model's scores against the softmax of its logits: several targets, tied embeddings, rows that are no tokens."""

from __future__ import annotations

import pytest
import torch

from megatron_r1.model.build import without_multi_token_prediction
from megatron_r1.model.scores import (
    LogProbQuery,
    head_weight,
    last_hidden_states,
    model_scores,
    model_topk_logprobs,
    selected_scores,
)
from megatron_r1.model.vocab_parallel import ReferenceHidden
from tests.support.gradients import largest
from tests.support.layouts import model_of


def batch(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    tokens_BL = torch.randint(5, 500, (3, 11), generator=generator)
    return tokens_BL, torch.arange(11).expand(3, 11), torch.randint(0, 500, (3, 11, 4), generator=generator)


@pytest.mark.parametrize("words", [None, 500])
@pytest.mark.parametrize("tied", [True, False])
def test_scores_are_the_softmax_of_the_logits(new_model, tied, words):
    shape = model_of("tiny_dense")
    shape.tied_embeddings = tied
    model, reference = new_model(shape), new_model(shape, seed=1)
    tokens_BL, positions_BL, targets_BLK = batch()
    with torch.no_grad():
        other = ReferenceHidden(
            last_hidden_states(reference, tokens_BL, positions_BL).transpose(0, 1), head_weight(reference)
        )
    scores = model_scores(
        model,
        tokens_BL,
        positions_BL,
        targets_BLK,
        temperature=0.7,
        vocab_size=words,
        reference=other,
        chunk_logits=2000,
    )
    loss = scores.log_probs.sum() + scores.entropy.sum() + scores.divergence.sum()
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    log_p, log_q = (
        (one(tokens_BL, positions_BL, None)[..., :words] / 0.7).log_softmax(-1) for one in (model, reference)
    )
    expected = log_p.gather(-1, targets_BLK), -(log_p.exp() * log_p).sum(-1), (log_p.exp() * (log_p - log_q)).sum(-1)
    for value, exact in zip(scores, expected, strict=True):
        torch.testing.assert_close(value, exact.detach(), rtol=1e-5, atol=1e-5, check_dtype=False)
    sum(values.sum() for values in expected).backward()
    for name, parameter in model.named_parameters():
        difference = (found[name] - parameter.grad).norm() / parameter.grad.norm()
        assert difference < 1e-4, (name, float(difference))


def test_one_target_drops_its_dimension_and_predictions_beyond_the_next_can_be_left_out(tiny):
    tokens_BL, positions_BL, targets_BLK = batch()
    with torch.no_grad(), without_multi_token_prediction(tiny):
        one = model_scores(tiny, tokens_BL, positions_BL, targets_BLK[..., 0])
        four = model_scores(tiny, tokens_BL, positions_BL, targets_BLK)
    assert one.log_probs.shape == one.entropy.shape == (3, 11) and one.divergence is None
    assert torch.equal(one.log_probs, four.log_probs[..., 0]) and torch.equal(one.entropy, four.entropy)


@pytest.mark.parametrize("tied", [True, False])
def test_several_queries_at_chosen_positions_alone(new_model, tied):
    shape = model_of("tiny_dense")
    shape.tied_embeddings = tied
    model = new_model(shape)
    tokens_BL, positions_BL, targets_BLK = batch()
    selected_BL = torch.rand(3, 11, generator=torch.Generator().manual_seed(2)) < 0.4
    targets_NK = targets_BLK[selected_BL]
    one, several = selected_scores(
        model,
        tokens_BL,
        positions_BL,
        selected_BL,
        [LogProbQuery(targets_NK[:, 0]), LogProbQuery(targets_NK, 0.7, 500)],
    )
    logits_NV = model(tokens_BL, positions_BL, None)[selected_BL]
    all_NV, log_probs_NV = logits_NV.log_softmax(-1), (logits_NV[:, :500] / 0.7).log_softmax(-1)
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(one.log_probs, all_NV.gather(-1, targets_NK[:, :1])[:, 0], **close)
    torch.testing.assert_close(several.log_probs, log_probs_NV.gather(-1, targets_NK), **close)
    with torch.no_grad():
        top = model_topk_logprobs(model, tokens_BL, positions_BL, selected_BL, 6, temperature=0.7, vocab_size=500)
    expected = log_probs_NV.topk(6)
    assert torch.equal(top.ids, expected.indices)
    torch.testing.assert_close(top.log_probs, expected.values.detach(), **close)
    parameters = [*model.parameters()]
    found = torch.autograd.grad(one.log_probs.sum() + several.log_probs.sum(), parameters)
    wanted = torch.autograd.grad(
        all_NV.gather(-1, targets_NK[:, :1]).sum() + log_probs_NV.gather(-1, targets_NK).sum(), parameters
    )
    assert largest(float((a - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True)) < 1e-4
