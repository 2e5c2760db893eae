"""PPO's update of policy and critic against loops in plain Python, and a critic that learns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_r1.config.run import RunConfig
from megatron_r1.model.build import native_tensors, without_multi_token_prediction
from megatron_r1.model.reward_head import add_reward_head
from megatron_r1.rl.advantages.critic import Critic
from megatron_r1.rl.learner import Learner
from megatron_r1.rl.policy.reference import ReferencePolicy
from megatron_r1.train.optimizer import Optimizer
from megatron_r1.train.state import TrainState
from tests.support.float64 import float64
from tests.support.learner_cases import assert_close, config_of, make_samples, shifted_reference, trainable, two_models
from tests.support.plain_grpo import response_log_probs
from tests.support.samples import prompt_of, row_of, tokens_of

SETTINGS: dict[str, Any] = {
    "advantage_estimator": "critic", "loss_aggregation": "token_mean", "kl_placement": "reward", "kl_estimator": "k1",
    "group_size": 1, "prompts_per_rollout": 4,
}  # fmt: skip
DISCOUNT, DECAY, CLIP = 0.95, 0.9, 0.05


@pytest.fixture(autouse=True, scope="module")
def in_float64(one_rank) -> Iterator[None]:
    with float64():
        yield


def ppo_config(shape: str = "tiny_dense", **rl) -> RunConfig:
    config = config_of(shape, **{**SETTINGS, **rl})
    config.rl.critic.gamma, config.rl.critic.gae_lambda, config.rl.critic.value_clip = DISCOUNT, DECAY, CLIP
    return config


def value_model(new_model: Callable, config: RunConfig) -> Any:
    """Of other weights than the policy's, with a head that says something."""
    model = trainable(new_model(config.model, seed=1))
    add_reward_head(model)
    generator = torch.Generator().manual_seed(5)
    model.reward_head.weight.data.copy_(0.1 * torch.randn(1, config.model.hidden_size, generator=generator))
    model.reward_head.bias.data.fill_(0.3)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and "output_layer" not in name)
    return model


def critic_beside(model: Any, config: RunConfig) -> Critic:
    return Critic(model, Optimizer(model, config.train), config.rl.critic)


def values_of(model: Any, sample: Any) -> torch.Tensor:
    """The value of each state from which a token of the response was drawn, [R], by a pass over this response alone."""
    tokens = row_of(sample)
    outputs = []

    def read(*, hidden_states, **_):
        outputs.append(hidden_states[:, 0] @ model.reward_head.weight[0] + model.reward_head.bias)
        return hidden_states

    with without_multi_token_prediction(model):
        model(tokens, torch.arange(tokens.shape[1])[None], None, output_processor=read)
    return outputs[0][len(prompt_of(sample)) - 1 : -1]


def by_hand(config: RunConfig, samples: list, values: list[list[float]], gaps: list[list[float]]):
    """Whitened advantages and returns of each token, from the sums written out."""
    advantages, returns = [], []
    for sample, value, gap in zip(samples, values, gaps, strict=True):
        if not sample.in_loss:
            continue
        rewards = [-config.rl.kl_coefficient * one for one in gap]
        rewards[-1] += sample.reward
        for end, reward in sample.steps:
            rewards[end] += reward
        following = [*value[1:], 0.0]
        delta = [r + DISCOUNT * after - v for r, v, after in zip(rewards, value, following, strict=True)]
        own = [sum((DISCOUNT * DECAY) ** k * d for k, d in enumerate(delta[t:])) for t in range(len(delta))]
        advantages.append(own)
        returns.append([a + v for a, v in zip(own, value, strict=True)])
    flat = [a for own in advantages for a in own]
    mean = sum(flat) / len(flat)
    deviation = (sum((a - mean) ** 2 for a in flat) / len(flat)) ** 0.5
    return [[(a - mean) / (deviation + 1e-8) for a in own] for own in advantages], returns


@pytest.mark.parametrize(("shape", "tokens_per_micro_batch"), [("tiny_dense", 1000), ("tiny", 20)])
def test_an_update_of_policy_and_critic_is_the_losses_written_out(new_model, shape, tokens_per_micro_batch):
    config = ppo_config(shape, tokens_per_micro_batch=tokens_per_micro_batch)
    policy = trainable(new_model(config.model))
    samples = make_samples(policy, 0.3)
    samples[1] = replace(samples[1], in_loss=False, steps=((0, 5.0),))
    samples[2] = replace(samples[2], steps=((3, 0.5), (7, -0.25), (7, 0.5)))
    reference = ReferencePolicy(policy, shifted_reference(policy))
    values = value_model(new_model, config)
    critic = critic_beside(values, config)
    learner = Learner(config, policy, Optimizer(policy, config.train), reference, 0, "cpu", critic=critic)
    _, row = learner.learn(samples, TrainState())

    plain, other = two_models(new_model, config)
    plain_values = value_model(new_model, config)
    in_loss = [sample for sample in samples if sample.in_loss]
    with torch.no_grad():
        sample_values = [values_of(plain_values, sample).tolist() for sample in samples]
        anchors = [response_log_probs(other, prompt_of(s), tokens_of(s), 0.7).tolist() for s in samples]
    gaps = [
        [own - anchor for own, anchor in zip(s.response.logprobs.tolist(), each, strict=True)]
        for s, each in zip(samples, anchors, strict=True)
    ]
    expected, returns = by_hand(config, samples, sample_values, gaps)
    tokens, policy_loss, value_loss = sum(map(len, expected)), torch.zeros(()), torch.zeros(())
    for sample, own, target in zip(in_loss, expected, returns, strict=True):
        log_probs = response_log_probs(plain, prompt_of(sample), tokens_of(sample), 0.7)
        for t, old in enumerate(sample.response.logprobs.tolist()):
            ratio = (log_probs[t] - old).exp()
            policy_loss = policy_loss - torch.minimum(ratio * own[t], ratio.clamp(0.8, 1.2) * own[t]) / tokens
        value_loss = value_loss + 0.5 * (values_of(plain_values, sample) - torch.tensor(target)).square().sum() / tokens
    policy_loss.backward()
    value_loss.backward()
    for found, model in ((policy, plain), (values, plain_values)):
        gradients = {name: p.main_grad for name, p in found.named_parameters() if p.requires_grad}
        assert_close(gradients, {name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert row["policy/loss"] == pytest.approx(float(policy_loss.detach()), rel=1e-4)
    assert row["critic/loss"] == pytest.approx(float(value_loss.detach()), rel=1e-4)
    assert row["policy/kl_in_reward"] == pytest.approx(config.rl.kl_coefficient * sum(map(sum, gaps)) / 4, rel=1e-4)
    flat = torch.tensor([r for each in returns for r in each])
    values_in_loss = torch.tensor(
        [v for s, each in zip(samples, sample_values, strict=True) for v in each if s.in_loss]
    )
    explained = 1 - (flat - values_in_loss).var(unbiased=False) / flat.var(unbiased=False)
    assert row["critic/explained_variance"] == pytest.approx(float(explained), rel=1e-3)
    assert row["critic/return"] == pytest.approx(float(flat.mean()), rel=1e-4)


def test_the_critic_learns_values_during_the_policys_warmup(new_model):
    config = ppo_config(kl_coefficient=0.0)
    config.rl.critic.warmup_rollouts, config.rl.critic.gamma, config.rl.critic.gae_lambda = 12, 1.0, 1.0
    config.rl.critic.learning_rate, config.rl.critic.value_clip = 1e-4, 10.0
    config.train.schedule.warmup_steps = 0
    policy = trainable(new_model(config.model))
    before = {name: tensor.clone() for name, tensor in native_tensors(policy)}
    critic = critic_beside(value_model(new_model, config), config)
    learner = Learner(config, policy, Optimizer(policy, config.train), None, 0, "cpu", critic=critic)
    samples, state, rows = make_samples(policy, 0.0), TrainState(), []
    for _ in range(12):
        state, row = learner.learn(samples, state)
        rows.append(row)
    print([f"{row['critic/loss']:.4f} {row['critic/explained_variance']:.3f}" for row in rows])
    assert all(torch.equal(tensor, before[name]) for name, tensor in native_tensors(policy))
    assert rows[-1]["critic/loss"] < 0.2 * rows[0]["critic/loss"]
    assert rows[0]["critic/explained_variance"] < 0 and rows[-1]["critic/explained_variance"] > 0.6
    assert {row["train/learning_rate"] for row in rows} == {0.0} and rows[0]["perf/critic_seconds"] > 0
    _, row = learner.learn(samples, state)
    assert row["train/learning_rate"] > 0
    assert not all(torch.equal(tensor, before[name]) for name, tensor in native_tensors(policy))


def test_what_moved_far_in_one_rollout_is_held_back(new_model):
    config = ppo_config(kl_coefficient=0.0, epochs_per_rollout=3)
    config.rl.critic.value_clip, config.rl.critic.learning_rate = 1e-3, 1e-2
    config.train.schedule.warmup_steps = 0
    policy = trainable(new_model(config.model))
    critic = critic_beside(value_model(new_model, config), config)
    learner = Learner(config, policy, Optimizer(policy, config.train), None, 0, "cpu", critic=critic)
    _, row = learner.learn(make_samples(policy, 0.0), TrainState())
    assert row["critic/clip_fraction"] > 0
