"""Gradients of one update, taken from the buffers that the optimizer reads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

Gradients = dict[str, torch.Tensor]


def gradients_of(model: Any, micro_batches: Sequence[Any], reader: Any, length: int = 32) -> tuple[Gradients, float]:
    """Gradients of one update, after which the model is as before, and the mean of the losses that it logged."""
    from megatron_r1.config.train import TrainConfig
    from megatron_r1.train.optimizer import Optimizer
    from megatron_r1.train.update import update

    config = TrainConfig()
    config.optimizer.max_grad_norm = 0.0
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    biases = {name: buffer.clone() for name, buffer in model.named_buffers() if name.endswith("expert_bias")}
    result = update(model, Optimizer(model, config), micro_batches, reader.forward, 1e-3, length)
    gradients = {name: parameter.main_grad.clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(before[name])
        for name, buffer in model.named_buffers():
            if name in biases:
                buffer.copy_(biases[name])
    return gradients, float(torch.stack([entry["train/loss"] for entry in result.passes.logged]).mean())


def largest(values: Iterable[float]) -> float:
    """The largest value; not a number where one is none, which Python's max may pass over."""
    return float(torch.tensor([*values], dtype=torch.float64).max())


def worst(found: Gradients, expected: Gradients) -> float:
    """The largest relative difference of a parameter's gradient."""
    return largest(float((found[name] - expected[name]).norm() / (expected[name].norm() + 1e-12)) for name in expected)
