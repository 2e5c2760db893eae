"""On-policy distillation: an update beside a teacher against the divergence written out over all logits, in float64."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from dataclasses import replace

import pytest
import torch

from megatron_r1.model.build import without_multi_token_prediction
from megatron_r1.rl.learner import Learner
from megatron_r1.rl.objective.aggregation import BatchTotals
from megatron_r1.rl.objective.objective import Objective, ObjectiveInputs
from megatron_r1.rl.objective.policy_terms import Clip
from megatron_r1.rl.policy.teacher import TeacherPolicy
from megatron_r1.train.optimizer import Optimizer
from megatron_r1.train.state import TrainState
from tests.support.float64 import float64
from tests.support.learner_cases import LENGTHS, assert_close, config_of, make_samples, trainable
from tests.support.plain_grpo import plain_advantages, response_log_probs
from tests.support.samples import logprobs_of, prompt_of, row_of, tokens_of

SPARE_ROWS = 32
"""Rows of the teacher's head beyond the student's."""
DISTILLATION = {
    "objective": "on_policy", "loss_aggregation": "token_mean", "kl_estimator": "exact", "kl_coefficient": 0.8,
    "group_size": 1, "prompts_per_rollout": 4, "tokens_per_micro_batch": 20,
}  # fmt: skip
TOKENS = sum(response for _, response in LENGTHS)


@pytest.fixture(autouse=True, scope="module")
def in_float64(one_rank) -> Iterator[None]:
    with float64():
        yield


def teacher_of(new_model, config):
    """Wider and deeper than the student, with another vocabulary's padding."""
    shape = copy(config.model)
    shape.hidden_size, shape.num_layers, shape.vocab_size = 96, 5, shape.vocab_size + SPARE_ROWS
    model = new_model(shape, seed=5)
    model.requires_grad_(False)
    return model


def learnt(new_model, config, samples, model, teacher):
    reference, optimizer = TeacherPolicy(teacher, config.model.vocab_size), Optimizer(model, config.train)
    _, row = Learner(config, model, optimizer, reference, 0, "cpu").learn(samples, TrainState())
    assert list(reference.saved()) == [] and all(parameter.grad is None for parameter in teacher.parameters())
    return {name: p.main_grad.clone() for name, p in model.named_parameters() if p.requires_grad}, row


def written_divergence(model, teacher, sample) -> torch.Tensor:
    """KL(model || teacher) at each token of a response, over the student's vocabulary, at the rollout's temperature."""
    tokens = row_of(sample)
    positions = torch.arange(tokens.shape[1])[None]
    with without_multi_token_prediction(model), without_multi_token_prediction(teacher):
        logits_p, logits_q = (one(tokens, positions, None)[0] for one in (model, teacher))
    log_p = (logits_p / 0.7).log_softmax(-1)
    log_q = (logits_q[:, : logits_p.shape[-1]] / 0.7).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)[len(prompt_of(sample)) - 1 : -1]


@pytest.mark.parametrize("shape", ["tiny", "tiny_dense"])
def test_an_update_is_the_divergence_over_the_whole_vocabulary_written_out(new_model, shape):
    config = config_of(shape, **DISTILLATION)
    model, teacher = trainable(new_model(config.model)), teacher_of(new_model, config)
    # Rewards of single responses say nothing.
    samples = [replace(sample, group=index) for index, sample in enumerate(make_samples(model, 0.3))]
    gradients, row = learnt(new_model, config, samples, model, teacher)
    plain = trainable(new_model(config.model))
    divergences = [written_divergence(plain, teacher, sample) for sample in samples]
    (0.8 * torch.cat(divergences).sum() / TOKENS).backward()
    difference = assert_close(gradients, {n: p.grad for n, p in plain.named_parameters() if p.requires_grad})
    print(f"{shape}: largest relative difference of a gradient {difference:.1e}")
    mean = torch.stack([divergence.mean() for divergence in divergences]).mean()
    assert row["policy/kl"] == pytest.approx(float(mean.detach()), rel=1e-9) and row["policy/kl"] > 0.1
    assert row["policy/advantage"] == 0 and row["train/gradient_norm"] > 0


@pytest.mark.parametrize("old_logprobs_from", ["rollout", "trainer"])
def test_the_sampled_form_is_each_tokens_log_ratio_beside_the_advantage_of_its_reward(new_model, old_logprobs_from):
    sampled = {"kl_estimator": "k1", "kl_placement": "advantage", "objective": "grpo", "kl_coefficient": 0.5}
    groups = {"group_size": 2, "prompts_per_rollout": 2, "old_logprobs_from": old_logprobs_from}
    config = config_of("tiny_dense", **DISTILLATION | sampled | groups)
    model, teacher = trainable(new_model(config.model)), teacher_of(new_model, config)
    samples = make_samples(model, 0.1)
    gradients, row = learnt(new_model, config, samples, model, teacher)
    plain = trainable(new_model(config.model))
    total, penalties = torch.zeros(()), []
    for sample in samples:
        response = prompt_of(sample), tokens_of(sample), 0.7
        log_probs, in_teacher = response_log_probs(plain, *response), written_log_probs(teacher, sample)
        old = logprobs_of(sample) if old_logprobs_from == "rollout" else log_probs.detach()
        penalties.append(0.5 * (old - in_teacher))
        of_reward = plain_advantages(sample, [other for other in samples if other.group == sample.group])
        advantages = torch.tensor(of_reward) - penalties[-1]
        ratio = (log_probs - old).exp()
        total = total - torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).sum() / TOKENS
    total.backward()
    assert_close(gradients, {n: p.grad for n, p in plain.named_parameters() if p.requires_grad})
    assert row["policy/kl_in_reward"] == pytest.approx(float(torch.cat(penalties).sum()) / 4, rel=1e-9)
    assert row["policy/kl_loss"] == 0


def written_log_probs(teacher, sample) -> torch.Tensor:
    """The teacher's log-probabilities of a response's tokens among the student's vocabulary."""
    tokens = row_of(sample)
    with torch.no_grad(), without_multi_token_prediction(teacher):
        logits = teacher(tokens, torch.arange(tokens.shape[1])[None], None)[0, :, :-SPARE_ROWS]
    start = len(prompt_of(sample))
    return (logits / 0.7).log_softmax(-1)[start - 1 : -1].gather(-1, tokens[0, start:, None])[:, 0]


@pytest.mark.parametrize("term", ["on_policy", "grpo"])
def test_on_average_over_samples_the_sampled_form_has_the_gradient_of_the_divergence(term):
    """Every token of a small vocabulary is sampled once, and counts by its probability."""
    logits_V, others_V = torch.randn(2, 7, generator=torch.Generator().manual_seed(1)).double()
    logits_V.requires_grad_()
    log_p_V, log_q_V = logits_V.log_softmax(-1), others_V.log_softmax(-1)
    old_V = log_p_V.detach()
    advantages_V = 7 * old_V.exp() * (log_q_V - old_V)
    mask = torch.ones(7, 1, dtype=torch.bool)
    inputs = ObjectiveInputs(log_p_V[:, None], old_V[:, None], advantages_V[:, None], mask)
    loss, _ = Objective(Clip(0.2, 0.2), term=term, aggregation="token_mean").loss(inputs, BatchTotals(7, 7, 1))
    divergence = (log_p_V.exp() * (log_p_V - log_q_V)).sum()
    found, expected = (torch.autograd.grad(value, logits_V, retain_graph=True)[0] for value in (loss, divergence))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
