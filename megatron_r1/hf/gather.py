"""Whole tensors from the shards of all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_r1.errors import DataError
from megatron_r1.model.shards import Shard, shards
from megatron_r1.parallel.comm import all_gather_object
from megatron_r1.parallel.mesh import pipeline_stage


def stage_leaders() -> list[int]:
    """Collective: the lowest rank of each pipeline stage, by stage."""
    stages = all_gather_object(pipeline_stage())
    return [stages.index(stage) for stage in range(max(stages) + 1)]


@dataclass(frozen=True)
class ShardLocation:
    """Which rank holds a shard, and where it lies in the whole tensor."""

    rank: int
    index: tuple[slice, ...]
    """The shard as an index into the whole tensor."""
    shape: tuple[int, ...]
    dtype: torch.dtype


ShardDirectory = dict[str, tuple[tuple[int, ...], list[ShardLocation]]]
"""Whole tensors by name: the shape, and the parts in one order that all ranks share."""


def whole_tensors(
    model: torch.nn.Module,
    of: Callable[[Tensor], Tensor] = Tensor.detach,
    to_rank: int = 0,
    stage: int | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Collective over all ranks: whole weights by name, in name order, one at a time.

    Only `to_rank` gets them; the others send their parts and yield nothing. A single rank gets views of its own memory.

    Args:
        of: what to gather in place of a weight; see `shards`.
        stage: only the weights of this pipeline stage; None gathers all.

    Raises:
        DataError: the ranks' shards do not make up a whole tensor.
    """
    this_stage = stage is None or stage == pipeline_stage()
    owned = [shard for shard in shards(model, of) if shard.owned and this_stage]
    yield from gather_whole(owned, next(model.parameters()).device, to_rank)


def gather_whole(owned: list[Shard], device: torch.device, to_rank: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Collective over all ranks: whole tensors from the shards that each rank owns; see `whole_tensors`.

    Args:
        owned: this rank's; their memory may be anywhere.
        device: where ranks send from and receive at.
    """
    yield from assemble(shard_directory(owned), owned, device, to_rank)


def shard_directory(owned: list[Shard]) -> ShardDirectory:
    """Collective over all ranks: every rank's owned shards, by whole tensor in name order.

    Raises:
        DataError: the ranks' shards do not make up a whole tensor.
    """
    rank = dist.get_rank()
    mine = [(s.name, s.whole_shape, ShardLocation(rank, s.index, tuple(s.tensor.shape), s.tensor.dtype)) for s in owned]
    found: ShardDirectory = {}
    for name, shape, part in (entry for entries in all_gather_object(mine) for entry in entries):
        found.setdefault(name, (shape, []))[1].append(part)
    for name, (shape, parts) in found.items():
        if sum(_size(part.shape) for part in parts) != _size(shape):
            raise DataError(f"{name}: the ranks' shards do not make up the whole tensor")
    return dict(sorted(found.items()))


def assemble(
    entries: ShardDirectory, owned: list[Shard], device: torch.device, to_rank: int = 0
) -> Iterator[tuple[str, Tensor]]:
    """Whole tensors, one at a time; collective over the ranks that have a part of `entries`, and `to_rank`.

    Only `to_rank` gets them; the others send their parts and yield nothing.

    Args:
        entries: what to assemble, in this order.
        owned: this rank's shards.
        device: where ranks send from and receive at.
    """
    mine: dict[str, list[Shard]] = {}
    for shard in owned:
        mine.setdefault(shard.name, []).append(shard)
    rank = dist.get_rank()
    for name, (shape, parts) in entries.items():
        local = iter(mine.get(name, ()))
        if rank != to_rank:
            for part in parts:
                if part.rank == rank:
                    dist.send(next(local).tensor.to(device).contiguous(), to_rank)
        elif len(parts) == 1 and parts[0].rank == rank:
            yield name, next(local).tensor
        else:
            whole = torch.empty(shape, dtype=parts[0].dtype, device=device)
            for part in parts:
                _fill(whole[part.index], part, next(local).tensor if part.rank == rank else None)
            yield name, whole
            del whole  # not held while the next is put together


def _fill(target: Tensor, part: ShardLocation, local: Tensor | None) -> None:
    """Put a part where it belongs: this rank's own, or the one that another rank sends."""
    if local is not None:
        target.copy_(local)
    elif target.is_contiguous():
        dist.recv(target, part.rank)
    else:
        buffer = torch.empty(part.shape, dtype=part.dtype, device=target.device)
        dist.recv(buffer, part.rank)
        target.copy_(buffer)


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for extent in shape:
        size *= extent
    return size
