"""Stages after pre-training: what stays of routers and multi-token layers, to the bit, and what the run says of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from megatron_r1.config.load import load
from megatron_r1.config.routing import RoutingConfig
from megatron_r1.config.run import RunConfig
from megatron_r1.config.train import TrainConfig
from megatron_r1.model.build import native_tensors
from megatron_r1.model.forward_backward import routers
from megatron_r1.model.names import in_multi_token_layer, in_router
from megatron_r1.preference.dpo import DirectPreference
from megatron_r1.rl.learner import Learner
from megatron_r1.rl.policy.reference import ReferencePolicy
from megatron_r1.runs.post_training import policy_lines, trained_weights
from megatron_r1.sft.supervised import SupervisedReader
from megatron_r1.train.optimizer import Optimizer
from megatron_r1.train.routing import post_training_policy
from megatron_r1.train.state import TrainState
from megatron_r1.train.update import update
from tests.support.dpo_cases import pairs
from tests.support.layouts import model_of
from tests.support.learner_cases import make_samples
from tests.support.packing_cases import chat_batch


def config_of(**routing: object) -> RunConfig:
    config = RunConfig(model=model_of("tiny"), routing=RoutingConfig(**routing), train=TrainConfig(steps=100))
    config.model.moe.sequence_loss_coefficient = 1e-4
    config.train.schedule.warmup_steps, config.rollout.temperature = 0, 0.7
    config.train.optimizer.max_grad_norm = 0.0
    config.rl.prompts_per_rollout, config.rl.group_size, config.rl.updates_per_rollout = 2, 2, 1
    return config


def fine_tuned(config: RunConfig, model, optimizer: Optimizer) -> float:
    reader = SupervisedReader(True, config.model.mtp.num_layers, "cpu")
    rows = reader.micro_batches(chat_batch(4, 32), 0, 1, 4)
    return update(model, optimizer, rows, reader.forward, 1e-3, *reader.shape(32, 4)).gradient_norm


def preferring(config: RunConfig, model, optimizer: Optimizer) -> float:
    preference = DirectPreference(model, ReferencePolicy(model), 0.1, 0.0, 0, "cpu")
    return preference.learn(optimizer, pairs(), 1e-3, 4)[0].gradient_norm


def reinforced(config: RunConfig, model, optimizer: Optimizer) -> float:
    config.train.schedule.learning_rate = 1e-3
    learner = Learner(config, model, optimizer, ReferencePolicy(model), 0, "cpu")
    return float(learner.learn(make_samples(model, 0.3), TrainState())[1]["train/gradient_norm"])


STAGES: dict[str, Callable[..., float]] = {"sft": fine_tuned, "dpo": preferring, "grpo": reinforced}


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("stage", STAGES)
def test_frozen_routers_stay_to_the_bit_without_moments_or_a_part_of_the_norm(new_model, stage, frozen):
    config = config_of(train_weights=not frozen)
    model, trained = new_model(config.model), trained_weights(config, stage == "sft")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained(name))
    optimizer = Optimizer(model, config.train)
    post_training_policy(config).apply(model, 0)
    before = {name: tensor.clone() for name, tensor in native_tensors(model)}
    norm = STAGES[stage](config, model, optimizer)
    changed = {name for name, tensor in native_tensors(model) if not torch.equal(tensor, before[name])}
    names = {parameter: name for name, parameter in model.named_parameters()}
    with_moments = {names[state.parameter] for state in optimizer.param_states()}
    assert len({name for name in before if in_router(name) and name.endswith("weight")}) == 4
    for names_of_state in (changed, with_moments):
        assert any(map(in_router, names_of_state)) != frozen
        assert "output_layer.weight" in names_of_state
        assert any(map(in_multi_token_layer, names_of_state)) == (stage == "sft")
    assert not any(name.endswith("expert_bias") for name in changed)
    squares = [float(p.main_grad.double().square().sum()) for p in names if p.requires_grad]
    assert norm == pytest.approx(math.sqrt(sum(squares)), rel=1e-5)


def test_balancing_moves_the_bias_where_it_is_configured(new_model):
    config = config_of(bias_update_rate=0.25)
    model = new_model(config.model)
    post_training_policy(config).apply(model, 0)
    fine_tuned(config, model, Optimizer(model, config.train))
    biases = [router.expert_bias for router in routers(model)]
    assert biases and all(bias.any() and set(bias.tolist()) <= {-0.25, 0.0, 0.25} for bias in biases)


@pytest.mark.parametrize(
    ("routing", "mtp", "lines"),
    [
        ("trained", True, ["routers: weights trained, balancing at rest", "multi-token layers: trained with weight 0.3"]),
        ("frozen", False, ["routers: weights frozen, balancing at rest", "multi-token layers: saved as they were loaded"]),
        (
            "balanced",
            False,
            [
                "routers: weights trained, balancing bias by 0.001, balance loss by 0",
                "multi-token layers: saved as they were loaded",
            ],
        ),
    ],
)
def test_a_run_says_what_it_does_with_routers_and_multi_token_layers(routing, mtp, lines):
    config = load("sft", [f"routing={routing}", "model.mtp.num_layers=1", "model.mtp.loss_coefficient=0.3"])
    assert policy_lines(config, mtp) == lines
    assert policy_lines(replace(config, model=load("sft", ["model=tiny_dense"]).model), mtp) == []
