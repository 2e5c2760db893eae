"""AdamW with resting moments against the update written out, and against torch's where nothing is rounded."""

from __future__ import annotations

import pytest
import torch

from megatron_r1.train.adamw import OffloadedMomentsAdamW
from tests.support.optimizer_states import restore, state_of

SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
STEPS = 5


def gradients() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(64, generator=generator) for _ in range(STEPS)]


def stepped(optimizer_of) -> tuple[torch.Tensor, dict]:
    weight = torch.linspace(-1, 1, 64).requires_grad_()
    optimizer = optimizer_of([{"params": [weight], **SETTINGS}])
    for gradient in gradients():
        weight.grad = gradient.clone()
        optimizer.step()
    return weight.detach(), optimizer.state[weight]


def test_moments_in_fp32_are_torchs_adamw():
    weight, state = stepped(lambda groups: OffloadedMomentsAdamW(groups, torch.float32))
    expected, moments = stepped(torch.optim.AdamW)
    assert torch.equal(weight, expected)
    assert all(torch.equal(state[key], moments[key]) for key in ("exp_avg", "exp_avg_sq"))


def test_moments_in_bf16_are_rounded_between_updates_and_only_there():
    weight, state = stepped(lambda groups: OffloadedMomentsAdamW(groups, torch.bfloat16))
    assert {state[key].dtype for key in ("exp_avg", "exp_avg_sq")} == {torch.bfloat16}
    expected = torch.linspace(-1, 1, 64).double()
    first, second = torch.zeros(64).double(), torch.zeros(64).double()
    for step, gradient in enumerate(gradients(), start=1):
        first = 0.9 * first + 0.1 * gradient.double()
        second = 0.95 * second + 0.05 * gradient.double() ** 2
        update = first / (1 - 0.9**step) / ((second / (1 - 0.95**step)).sqrt() + 1e-8)
        expected = expected * (1 - 1e-2 * 0.1) - 1e-2 * update
        first, second = first.bfloat16().double(), second.bfloat16().double()
    torch.testing.assert_close(weight.double(), expected, rtol=1e-5, atol=1e-6)
    unrounded, _ = stepped(torch.optim.AdamW)
    assert (weight - unrounded).abs().max() > 1e-5


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_with_offloaded_moments_resumes_from_its_state(precision, new_model):
    from megatron_r1.config.train import OptimizerConfig, TrainConfig
    from megatron_r1.model.build import native_tensors
    from megatron_r1.train.optimizer import Optimizer
    from megatron_r1.train.stream import next_token_forward
    from megatron_r1.train.update import update
    from tests.support.layouts import model_of
    from tests.support.native_weights import load_native_tensors

    train = TrainConfig(optimizer=OptimizerConfig(moments_dtype=precision))
    rows_BL = torch.randint(0, 512, (4, 33), generator=torch.Generator().manual_seed(0))

    def advance(model, optimizer):
        update(model, optimizer, rows_BL.split(2), next_token_forward, 1e-3, 32)

    model = new_model(model_of("tiny"))
    optimizer = Optimizer(model, train)
    advance(model, optimizer)
    saved = state_of(model, optimizer)
    wanted = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    assert {tensor.dtype for name, tensor in saved.items() if name.startswith("exp_avg")} == {wanted}
    other = new_model(model_of("tiny"), seed=1)
    resumed = Optimizer(other, train)
    load_native_tensors(other, {name: tensor.clone() for name, tensor in native_tensors(model)})
    restore(other, resumed, saved, updates=1)
    advance(model, optimizer)
    advance(other, resumed)
    for (name, tensor), (_, again) in zip(native_tensors(model), native_tensors(other), strict=True):
        assert torch.equal(tensor, again), name
