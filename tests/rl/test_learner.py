"""An update of the learner against the same loss written out in plain torch, and the reference policy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch

from megatron_r1.model.build import native_tensors, without_multi_token_prediction
from megatron_r1.model.names import in_multi_token_layer
from megatron_r1.rl.advantages.group_relative import ragged_group_advantages
from megatron_r1.rl.learner import Learner, plan_mini_batches, shares_of
from megatron_r1.rl.policy.reference import ReferencePolicy
from megatron_r1.train.optimizer import Optimizer
from megatron_r1.train.state import TrainState
from tests.support.float64 import float64
from tests.support.learner_cases import (
    LENGTHS,
    REWARDS,
    assert_close,
    config_of,
    make_samples,
    shifted_reference,
    trainable,
    two_models,
)
from tests.support.plain_grpo import plain_loss, response_log_probs
from tests.support.samples import logprobs_of, make_sample, prompt_of, row_of, tokens_of


@pytest.fixture(autouse=True, scope="module")
def in_float64(one_rank) -> Iterator[None]:
    with float64():
        yield


def learnt(new_model: Callable, **rl) -> tuple[dict, dict, dict]:
    """Gradients, metrics and weights after one update by the learner."""
    config = config_of(**rl)
    # What pre-training does for balance, and more: nothing of it may reach an update of the policy.
    config.model.moe.sequence_loss_coefficient, config.model.moe.bias_update_rate = 1.0, 0.5
    model = trainable(new_model(config.model))
    samples, reference = make_samples(model, 0.3), ReferencePolicy(model, shifted_reference(model))
    optimizer = Optimizer(model, config.train)
    state, row = Learner(config, model, optimizer, reference, 0, "cpu").learn(samples, TrainState())
    assert (state.step, state.updates) == (1, config.rl.updates_per_rollout * config.rl.epochs_per_rollout)
    assert state.consumed_tokens == sum(map(sum, LENGTHS))
    gradients = {name: p.main_grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    return gradients, row, {name: tensor.clone() for name, tensor in native_tensors(model)}


def written_out(new_model: Callable, shape: str) -> tuple[dict, float]:
    """Gradients and value of the loss, response by response and token by token."""
    config = config_of(shape)
    model, other = trainable(new_model(config.model)), new_model(config.model)
    samples = make_samples(model, 0.3)
    shifted = shifted_reference(model)
    for name, tensor in native_tensors(other):
        tensor.copy_(shifted[name])
    total = plain_loss(model, other, samples, temperature=0.7, epsilon=0.2, kl_coefficient=0.05)
    total.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}, float(total.detach())


@pytest.mark.parametrize(
    ("shape", "tokens_per_micro_batch"), [("tiny", 1), ("tiny", 40), ("tiny", 1000), ("tiny_dense", 40)]
)
def test_an_update_is_the_loss_written_out(new_model, shape, tokens_per_micro_batch):
    gradients, row, _ = learnt(new_model, shape=shape, tokens_per_micro_batch=tokens_per_micro_batch)
    expected, loss = written_out(new_model, shape)
    print(f"largest relative difference of a gradient {assert_close(gradients, expected):.1e}")
    assert row["policy/loss"] == pytest.approx(loss, rel=1e-5)
    norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in expected.values() if gradient is not None))
    assert row["train/gradient_norm"] == pytest.approx(norm, rel=1e-5)
    assert row["policy/kl"] > 0 and row["policy/clip_fraction"] > 0 and row["train/skipped_updates"] == 0


def test_process_supervision_is_the_loss_with_an_advantage_for_each_token(new_model):
    config = config_of(advantage_estimator="process")
    model = trainable(new_model(config.model))
    samples, reference = make_samples(model, 0.3), ReferencePolicy(model, shifted_reference(model))
    # Steps that end at one token, with the response, and in one group only.
    samples[0] = replace(samples[0], steps=((1, 0.5), (4, -0.25), (4, 0.5)))
    samples[1] = replace(samples[1], steps=((2, 1.0),))
    Learner(config, model, Optimizer(model, config.train), reference, 0, "cpu").learn(samples, TrainState())
    plain, other = two_models(new_model, config)
    plain_loss(plain, other, samples, temperature=0.7, epsilon=0.2, kl_coefficient=0.05).backward()
    gradients = {name: p.main_grad for name, p in model.named_parameters() if p.requires_grad}
    assert_close(gradients, {name: p.grad for name, p in plain.named_parameters() if p.requires_grad})


def test_without_steps_process_supervision_is_group_relative_to_the_bit(new_model):
    (by_response, *_), (by_step, *_) = (learnt(new_model, advantage_estimator=how) for how in ("group", "process"))
    assert all(torch.equal(by_response[name], by_step[name]) for name in by_response)


def test_multi_token_layers_and_balancing_biases_are_carried_through_untouched(new_model):
    _, row, after = learnt(new_model, updates_per_rollout=2, epochs_per_rollout=2)
    before = dict(native_tensors(new_model(config_of().model)))
    carried = [name for name in before if in_multi_token_layer(name) or name.endswith("expert_bias")]
    assert len([name for name in carried if name.endswith("expert_bias")]) == 4 and row["train/skipped_updates"] == 0
    for name in carried:
        assert torch.equal(after[name], before[name]), name
    assert not torch.equal(after["output_layer.weight"], before["output_layer.weight"])


def test_the_trainers_own_log_probs_are_those_of_a_rollout_that_it_sampled(new_model):
    updates = []
    for source in ("rollout", "trainer"):
        config = config_of(old_logprobs_from=source, kl_coefficient=0.0)
        model = trainable(new_model(config.model))
        samples, optimizer = make_samples(model, 0.0), Optimizer(model, config.train)
        _, row = Learner(config, model, optimizer, None, 0, "cpu").learn(samples, TrainState())
        assert row["mismatch/logprob_max_abs"] < 1e-5 and row["policy/ratio"] == pytest.approx(1.0, abs=1e-5)
        updates.append({name: p.main_grad.clone() for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in updates[0].items():
        torch.testing.assert_close(updates[1][name], gradient, rtol=1e-3, atol=1e-6)


def test_the_reference_is_swapped_in_and_out_again(new_model):
    model = new_model(config_of().model)
    before = {name: tensor.clone() for name, tensor in native_tensors(model)}
    weights = shifted_reference(model)
    reference = ReferencePolicy(model, weights)
    with pytest.raises(InterruptedError), reference.in_place():
        assert all(torch.equal(tensor, weights[name]) for name, tensor in native_tensors(model))
        raise InterruptedError
    assert all(torch.equal(tensor, before[name]) for name, tensor in native_tensors(model))
    reference.reset()
    saved = {shard.name: shard.tensor for _, shard in reference.saved()}
    with reference.in_place():
        assert all(torch.equal(tensor, before[name]) for name, tensor in native_tensors(model))
    assert any(name.endswith("expert_bias") for name in saved)


@pytest.mark.parametrize(("ranks", "updates", "epochs"), [(1, 2, 1), (3, 2, 1), (3, 3, 2), (5, 1, 3)])
def test_each_rank_needs_the_samples_of_its_passes_alone(ranks, updates, epochs):
    """All samples once an epoch; ranks with fewer passes make up for them with a sample that may be another rank's."""
    config = config_of(updates_per_rollout=updates, epochs_per_rollout=epochs, tokens_per_micro_batch=24)
    samples = [make_sample(response_tokens=(2,) * (1 + 7 * index % 23)) for index in range(17)]
    plans = plan_mini_batches(config, samples, 3, ranks)
    assert len(plans) == updates * epochs and plans == plan_mini_batches(config, samples, 3, ranks)
    for epoch in range(epochs):
        passes = [batch for plan in plans[epoch * updates :][:updates] for of in plan.micro_batches for batch in of]
        assert sorted(index for batch in passes for index in batch) == list(range(17))
    for rank, share in enumerate(shares_of(plans, ranks)):
        own = {index for plan in plans for batch in plan.micro_batches[rank] for index in batch}
        assert {*share} == own | {plan.fill[0] for plan in plans if plan.num_fills(rank)} and share == sorted(share)
    filled = any(plan.num_fills(rank) for plan in plans for rank in range(ranks))
    assert filled if ranks == 5 else not filled or ranks > 1


def exact_divergence(model, reference, sample) -> torch.Tensor:
    """KL(policy || reference) over the whole vocabulary at each token of an response, at the rollout's temperature."""
    tokens = row_of(sample)
    positions = torch.arange(tokens.shape[1])[None]
    with without_multi_token_prediction(model), without_multi_token_prediction(reference):
        log_p, log_q = ((one(tokens, positions, None)[0] / 0.7).log_softmax(-1) for one in (model, reference))
    start = len(prompt_of(sample)) - 1
    return (log_p.exp() * (log_p - log_q)).sum(-1)[start:-1]


def test_the_exact_penalty_is_that_of_the_whole_vocabulary(new_model):
    gradients, row, _ = learnt(new_model, shape="tiny_dense", kl_estimator="exact", tokens_per_micro_batch=40)
    config = config_of("tiny_dense")
    model, other = two_models(new_model, config)
    samples = make_samples(model, 0.3)
    divergences = [exact_divergence(model, other, sample).mean() for sample in samples]
    assert row["policy/kl"] == pytest.approx(float(torch.stack(divergences).mean().detach()), rel=1e-4)
    surrogate = plain_loss(model, other, samples, temperature=0.7, epsilon=0.2, kl_coefficient=0.0)
    (surrogate + 0.05 * torch.stack(divergences).mean()).backward()
    assert_close(gradients, {name: p.grad for name, p in model.named_parameters() if p.requires_grad})


@pytest.mark.parametrize("estimator", ["k1", "exact"])
def test_a_penalty_in_the_reward_changes_advantages_alone(new_model, estimator):
    gradients, row, _ = learnt(new_model, shape="tiny_dense", kl_placement="reward", kl_estimator=estimator)
    config = config_of("tiny_dense")
    model, other = two_models(new_model, config)
    samples = make_samples(model, 0.3)
    penalties = []
    with torch.no_grad():
        for sample in samples:
            if estimator == "exact":
                penalties.append(0.05 * float(exact_divergence(model, other, sample).sum()))
                continue
            inputs = prompt_of(sample), tokens_of(sample), 0.7
            penalties.append(0.05 * float((logprobs_of(sample) - response_log_probs(other, *inputs)).sum()))
    assert row["policy/kl_in_reward"] == pytest.approx(sum(penalties) / 4, rel=1e-4) and row["policy/kl_loss"] == 0
    changed = [replace(s, reward=s.reward - penalty) for s, penalty in zip(samples, penalties, strict=True)]
    plain_loss(model, other, changed, temperature=0.7, epsilon=0.2, kl_coefficient=0.0).backward()
    assert_close(gradients, {name: p.grad for name, p in model.named_parameters() if p.requires_grad})


def test_a_correction_weighs_tokens_by_trainer_over_engine(new_model):
    """At the first update the ratio is 1: the gradient is that of weight x advantage x log p."""
    config = config_of("tiny_dense", old_logprobs_from="trainer", kl_coefficient=0.0)
    config.rl.importance_sampling.kind, config.rl.importance_sampling.high = "truncated", 1.1
    model = trainable(new_model(config.model))
    samples, optimizer = make_samples(model, 0.3), Optimizer(model, config.train)
    _, row = Learner(config, model, optimizer, None, 0, "cpu").learn(samples, TrainState())
    found = {name: p.main_grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model = trainable(new_model(config.model))
    advantages = ragged_group_advantages(torch.tensor(REWARDS, dtype=torch.float64), [2, 2])
    total = torch.zeros(())
    for sample, advantage in zip(samples, advantages.tolist(), strict=True):
        log_probs = response_log_probs(model, prompt_of(sample), tokens_of(sample), 0.7)
        weights = (log_probs.detach() - logprobs_of(sample)).exp().clamp(max=1.1)
        total = total - (weights * advantage * log_probs).mean() / len(samples)
    total.backward()
    assert_close(found, {name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert 0 < row["mismatch/importance_weight_clipped"] < 1 and row["policy/ratio"] == pytest.approx(1.0, abs=1e-5)
    assert row["mismatch/k3"] > 0 and 0 < row["mismatch/outside_range"] < 1


def test_an_entropy_bonus_and_the_average_over_tokens_reach_the_update(new_model):
    gradients, row, _ = learnt(
        new_model, shape="tiny_dense", kl_coefficient=0.0, entropy_coefficient=0.1, loss_aggregation="token_mean",
        tokens_per_micro_batch=40,
    )  # fmt: skip
    model = trainable(new_model(config_of("tiny_dense").model))
    samples = make_samples(model, 0.3)
    advantages = ragged_group_advantages(torch.tensor(REWARDS), [2, 2]).tolist()
    tokens, total, entropies = sum(length for _, length in LENGTHS), torch.zeros(()), []
    for sample, advantage in zip(samples, advantages, strict=True):
        whole = row_of(sample)
        with without_multi_token_prediction(model):
            logits = model(whole, torch.arange(whole.shape[1])[None], None)[0, len(prompt_of(sample)) - 1 : -1]
        log_p = (logits / 0.7).log_softmax(-1)
        chosen = log_p.gather(-1, torch.tensor(tokens_of(sample))[:, None])[:, 0]
        ratio = (chosen - logprobs_of(sample)).exp()
        gain = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
        entropy = -(log_p.exp() * log_p).sum(-1)
        entropies.append(entropy.detach())
        total = total - (gain + 0.1 * entropy).sum() / tokens
    total.backward()
    assert_close(gradients, {name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert row["policy/loss"] == pytest.approx(float(total.detach()), rel=1e-4)
    assert row["policy/entropy"] == pytest.approx(float(torch.cat(entropies).mean()), rel=1e-4)


def test_the_reference_is_the_policy_again_every_so_many_rollouts(new_model, caplog):
    config = config_of("tiny_dense", reference_sync_interval=2)
    config.rl.mismatch.logprob_max_abs_warn = 0.01
    model = trainable(new_model(config.model))
    samples, optimizer, reference = make_samples(model, 0.3), Optimizer(model, config.train), ReferencePolicy(model)
    learner, state, rows = Learner(config, model, optimizer, reference, 0, "cpu"), TrainState(), []
    for _ in range(3):
        state, row = learner.learn(samples, state)
        rows.append(row)
    # Each update is at the policy that its passes see: 0 as long as that is the reference.
    assert rows[0]["policy/kl"] < 1e-9 < rows[1]["policy/kl"] and rows[2]["policy/kl"] < 1e-9
    assert (
        "step 1: mismatch/logprob_max_abs=" in caplog.text
        and "is above rl.mismatch.logprob_max_abs_warn=0.01" in caplog.text
    )
