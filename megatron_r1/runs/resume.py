"""Restores a training run from its newest checkpoint."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_r1.checkpoint.manifest import Manifest
from megatron_r1.checkpoint.sharded import WholeTensors
from megatron_r1.checkpoint.tensors import has_tensors, read_state, read_tensors
from megatron_r1.config.run import RunConfig
from megatron_r1.errors import DataError
from megatron_r1.model.chunks import Model
from megatron_r1.model.shards import Shard, shards
from megatron_r1.train.ema import MovingAverage
from megatron_r1.train.optimizer import MOMENTS, Optimizer
from megatron_r1.train.optimizer_state import MASTER, OptimizerState
from megatron_r1.train.state import TrainState

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Resumed:
    """Contents of the checkpoint beside weights and optimizer state."""

    folder: Path
    """The checkpoint."""
    state: TrainState
    extra: dict[str, Tensor]
    """Further tensors, on rank 0 only."""


def resume(
    saved: tuple[Path, Manifest], config: RunConfig, model: Model, optimizer: Optimizer, ema: MovingAverage | None
) -> Resumed:
    """Collective: load a checkpoint that was verified."""
    folder, manifest = saved
    state, rank = read_train_state(folder), dist.get_rank()
    with ExitStack() as stack:
        kinds = ("model", MASTER, *MOMENTS)
        tensors = {kind: stack.enter_context(WholeTensors(folder, kind)) for kind in kinds}

        def read(kind: str, shard: Shard) -> Tensor:
            return tensors[kind].part(shard.name, shard.whole_shape, shard.offset, tuple(shard.tensor.shape))

        for shard in shards(model):
            shard.tensor.copy_(read("model", shard))
        OptimizerState(model, optimizer).load(read, state.updates)
    if ema:
        with WholeTensors(folder, "ema") as averages:
            ema.load(averages)
    if manifest.metadata["layout"] == layout(config):
        torch.set_rng_state(read_tensors(folder, "random", rank)["cpu"])
    extra = read_tensors(folder, "extra", 0) if rank == 0 and has_tensors(folder, "extra", 0) else {}
    logger.info("resuming %s at step %d", folder, state.step)
    return Resumed(folder, state, extra)


def read_train_state(folder: Path) -> TrainState:
    """The state in a checkpoint; raises DataError where another version of this program saved it."""
    state = read_state(folder)
    if state.keys() != TrainState().as_dict().keys() or not all(type(value) is int for value in state.values()):
        raise DataError(f"{folder}: its state is not one of this version: {', '.join(sorted(state))}")
    return TrainState(**state)


def layout(config: RunConfig) -> dict[str, int]:
    """Degrees of parallelism. With other degrees than before, a resume starts with new random states, as they are by rank."""
    return {"ranks": dist.get_world_size(), **asdict(config.parallel)}
