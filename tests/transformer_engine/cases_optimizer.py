"""FusedAdam is torch's AdamW in every way: run in a process of Transformer Engine by test_fp8.py.

With moments in host memory the optimizer is this project's AdamW, which tests/train/test_adamw.py holds to torch's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_r1.config.rl import CriticConfig
from megatron_r1.config.train import OptimizerConfig, TrainConfig
from megatron_r1.model.build import native_tensors
from megatron_r1.model.reward_head import add_reward_head
from megatron_r1.model.shards import Shard, gather_whole
from megatron_r1.train.optimizer import Optimizer
from tests.support.layouts import model_of
from tests.support.native_weights import load_native_tensors
from tests.support.optimizer_states import restore, state_of

FUSED = OptimizerConfig()
TORCH = OptimizerConfig(offload=True)
KINDS = {
    "FusedAdam": ("fp32", FUSED),
    "FusedAdam over bf16": ("bf16", FUSED),
    "moments in bf16": ("fp32", OptimizerConfig(moments_dtype="bf16")),
    "moments in bf16 in host memory": ("bf16", OptimizerConfig(moments_dtype="bf16", offload=True)),
}
"""Type of the weights, and where and in which type moments are between updates."""

Trained = tuple[Any, Optimizer]


@pytest.fixture
def begin(new_model: Callable[..., Any]) -> Callable[..., Trained]:
    def model_and_optimizer(settings: OptimizerConfig, dtype: str = "fp32", seed: int = 0) -> Trained:
        model = new_model(replace(model_of("tiny"), dtype=dtype, num_layers=2), seed=seed)
        return model, Optimizer(model, TrainConfig(optimizer=settings))

    return model_and_optimizer


def advance(trained: Trained, *numbers: int) -> None:
    """An update by random gradients for each number; that of number 2 is skipped, as a gradient is not finite."""
    _, optimizer = trained
    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        optimizer.zero_gradients()
        for buffer in optimizer.buffers():
            buffer.grad_data.copy_(torch.randn(buffer.grad_data.shape, generator=generator) * 1e-2)
            buffer.grad_data[7] *= float("inf") if number == 2 else 1.0
        assert optimizer.gradients_finite() == (number != 2)
        if number != 2:
            optimizer.step(1e-3 * number)


def resumed(trained: Trained, other: Trained, updates: int) -> Trained:
    """Another model and optimizer with all of their state."""
    saved = state_of(*trained)
    load_native_tensors(other[0], {name: tensor.clone() for name, tensor in native_tensors(trained[0])})
    restore(*other, saved, updates)
    return other


def everything(trained: Trained) -> dict[str, Tensor]:
    tensors = [*native_tensors(trained[0]), *state_of(*trained).items()]
    return {name: tensor.clone() for name, tensor in tensors}


def test_it_is_fused_adam(begin: Callable[..., Trained]) -> None:
    """Else nothing below would be about it."""
    _, optimizer = begin(FUSED)
    assert {type(part.optimizer).__name__ for part in optimizer.param_states()} == {"FusedAdam"}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_it_updates_as_torchs(begin: Callable[..., Trained], dtype: str) -> None:
    found, expected = begin(FUSED, dtype), begin(TORCH, dtype)
    for trained in (found, expected):
        advance(trained, 1, 2, 3, 4)
    tensors = everything(expected)
    for name, tensor in everything(found).items():
        tolerance = 2.0**-7 if tensor.dtype == torch.bfloat16 else 1e-5  # the last bit of a weight in bf16
        torch.testing.assert_close(
            tensor, tensors[name], rtol=tolerance, atol=1e-7, msg=lambda found, n=name: n + found
        )


@pytest.mark.parametrize(("dtype", "settings"), KINDS.values(), ids=KINDS)
def test_it_resumes_to_the_bit(begin: Callable[..., Trained], dtype: str, settings: OptimizerConfig) -> None:
    trained = begin(settings, dtype)
    advance(trained, 1, 2, 3)
    again = resumed(trained, begin(settings, dtype, seed=1), updates=2)
    for one in (trained, again):
        advance(one, 2, 4, 5)
    expected = everything(trained)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in everything(again).items())


@pytest.mark.parametrize(("first", "second"), [(FUSED, TORCH), (TORCH, FUSED)], ids=["to torch", "from torch"])
def test_its_state_is_that_of_torchs(
    begin: Callable[..., Trained], first: OptimizerConfig, second: OptimizerConfig
) -> None:
    """A checkpoint from a CPU continues on CUDA, and the other way round."""
    trained = begin(first)
    advance(trained, 1, 2, 3)
    other = resumed(trained, begin(second, seed=1), updates=2)
    for one in (trained, other):
        advance(one, 4)
    expected = everything(trained)
    for name, tensor in everything(other).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_a_critic_resumes_to_the_bit(begin: Callable[..., Trained], new_model: Callable[..., Any]) -> None:
    from megatron_r1.rl.advantages.critic import Critic

    def critic_of(seed: int) -> tuple[Critic, Trained]:
        model = new_model(replace(model_of("tiny"), num_layers=2), seed=seed)
        add_reward_head(model)
        trained = model, Optimizer(model, TrainConfig(optimizer=FUSED))
        return Critic(*trained, CriticConfig()), trained

    critic, trained = critic_of(0)
    advance(trained, 1, 2, 3)
    critic._updates = 2
    shards: dict[str, list[Shard]] = {}
    for kind, shard in critic.saved():
        shards.setdefault(kind, []).append(replace(shard, tensor=shard.tensor.clone()))
    saved = {kind: dict(gather_whole(each, torch.device("cpu"))) for kind, each in shards.items()}
    other, again = critic_of(1)
    other.restore(lambda kind: saved.get(kind))  # type: ignore[arg-type,return-value]
    for one in (trained, again):
        advance(one, 4)
    expected = everything(trained)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in everything(again).items())
