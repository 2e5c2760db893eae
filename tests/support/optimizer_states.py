"""An optimizer's state of one rank as plain tensors by name, and back."""

from __future__ import annotations

from typing import Any

import torch


def state_of(model: Any, optimizer: Any) -> dict[str, torch.Tensor]:
    """Kind, parameter's name and place -> a copy of the state."""
    from megatron_r1.train.optimizer_state import OptimizerState

    return {
        f"{kind}/{shard.name}/{shard.offset}": shard.tensor.clone()
        for kind, shard in OptimizerState(model, optimizer).shards()
    }


def restore(model: Any, optimizer: Any, state: dict[str, torch.Tensor], updates: int) -> None:
    from megatron_r1.train.optimizer_state import OptimizerState

    OptimizerState(model, optimizer).load(lambda kind, shard: state[f"{kind}/{shard.name}/{shard.offset}"], updates)
