"""Routing policies act on the next update; no token is dropped unseen; the bias balances the experts."""

from __future__ import annotations

import statistics

import pytest
import torch

from megatron_r1.config.model import AttentionConfig, ModelConfig, MoeConfig, MtpConfig
from megatron_r1.config.run import RunConfig
from megatron_r1.config.schedule import PhaseConfig
from megatron_r1.config.train import OptimizerConfig, TrainConfig
from megatron_r1.model.forward_backward import layer_name, routers
from megatron_r1.train.optimizer import Optimizer
from megatron_r1.train.routing import FROZEN, RoutingPolicy, check_none_dropped, pretraining_policy
from megatron_r1.train.stream import next_token_forward
from megatron_r1.train.update import update
from tests.support.layouts import model_of

ROWS_BL = torch.randint(0, 512, (4, 33), generator=torch.Generator().manual_seed(0))


def after(model, policy: RoutingPolicy, tokens: int = 0) -> tuple[dict, dict]:
    """Each router's bias, and the gradients, after one update of a model under a policy."""
    optimizer = Optimizer(model, TrainConfig(optimizer=OptimizerConfig(max_grad_norm=0.0)))
    policy.apply(model, tokens)
    update(model, optimizer, ROWS_BL.split(2), next_token_forward, 0.0, 32)
    gradients = {name: parameter.main_grad.clone() for name, parameter in model.named_parameters()}
    return {layer_name(router): router.expert_bias.clone() for router in routers(model)}, gradients


def test_the_bias_moves_by_the_rate_of_the_tokens_at_hand(new_model):
    config = RunConfig(model=model_of("tiny"))
    config.train.schedule.bias_rate_phases = [PhaseConfig(until=1000, value=0.25), PhaseConfig(until=2000, value=0.0)]
    policy = pretraining_policy(config)
    early, _ = after(new_model(config.model), policy, 999)
    late, _ = after(new_model(config.model), policy, 1000)
    assert list(early) == ["layer 2", "layer 3", "layer 4", "mtp 1"]
    for layer, bias_E in early.items():
        assert set(bias_E.tolist()) <= {-0.25, 0.0, 0.25} and bias_E.any()
        assert not late[layer].any()


def test_the_frozen_policy_leaves_bias_and_gradients_alone_whatever_the_model_says(new_model):
    model = model_of("tiny")
    model.moe.bias_update_rate, model.moe.sequence_loss_coefficient = 0.5, 10.0
    bias, gradients = after(new_model(model), FROZEN)
    assert not any(bias_E.any() for bias_E in bias.values())
    model.moe.sequence_loss_coefficient = 0.0
    _, without = after(new_model(model), FROZEN)
    assert all(torch.equal(gradient, without[name]) for name, gradient in gradients.items())
    model.moe.sequence_loss_coefficient = 10.0
    _, balanced = after(new_model(model), pretraining_policy(RunConfig(model=model)))
    router = "decoder.layers.1.mlp.router.weight"
    assert not torch.allclose(balanced[router], gradients[router], rtol=0.1)


def test_the_weight_of_extra_predictions_is_read_at_every_update(new_model):
    gradients = []
    for weight in (0.3, 0.1):
        model = new_model(model_of("tiny"))
        model.config.mtp_loss_scaling_factor = weight
        gradients.append(after(model, FROZEN)[1]["mtp.layers.0.eh_proj.weight"])
    torch.testing.assert_close(gradients[0], 3 * gradients[1], rtol=1e-3, atol=1e-7)
    assert gradients[1].abs().max() > 1e-4


def test_a_dropped_token_is_an_error(new_model):
    model = new_model(model_of("tiny"))
    model.config.moe_expert_capacity_factor = 0.5
    result = update(model, Optimizer(model, TrainConfig()), ROWS_BL.split(2), next_token_forward, 0.0, 32)
    with pytest.raises(RuntimeError, match=r"layer 2: 128 tokens made \d+ visits to experts, not 2 each"):
        check_none_dropped(result.passes.expert_load, 4 * 32, 2)


SMALL = ModelConfig(
    num_layers=2,
    hidden_size=32,
    num_attention_heads=2,
    ffn_hidden_size=64,
    vocab_size=64,
    init_std=0.2,
    attention=AttentionConfig(q_lora_rank=0, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8),
    moe=MoeConfig(ffn_hidden_size=16, sequence_loss_coefficient=0.0),
    mtp=MtpConfig(num_layers=0),
)


def busiest(new_model, rate: float) -> list[float]:
    """max/mean expert load of 60 steps, on rows where some tokens come much more often than others."""
    model = new_model(SMALL)
    optimizer = Optimizer(model, TrainConfig())
    RoutingPolicy(bias_rate=rate, sequence_loss=0.0).apply(model, 0)
    generator = torch.Generator().manual_seed(1)
    loads = []
    for _ in range(60):
        starts_BL = (64 * torch.rand((32, 33), generator=generator) ** 2).long()
        rows_BL = torch.where(torch.arange(33) % 2 > 0, (starts_BL.roll(1, 1) + 1) % 64, starts_BL)
        load_E = update(model, optimizer, [rows_BL], next_token_forward, 3e-3, 32).passes.expert_load["layer 2"]
        loads.append(float(load_E.max() / load_E.mean()))
    return loads


def test_the_bias_balances_what_is_lopsided_without_it(new_model):
    with_bias, without = busiest(new_model, 0.01)[-20:], busiest(new_model, 0.0)[-20:]
    usual = statistics.mean(with_bias)
    print(f"max/mean load of the last 20 steps: {usual:.2f}, at most {max(with_bias):.2f}; without {min(without):.2f}")
    assert usual < 1.3 and min(without) > max(with_bias)
