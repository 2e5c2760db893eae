"""Whole tensors from the shards of all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_r1.errors import DataError
from megatron_r1.model.shards import Shard, shards
from megatron_r1.parallel.comm import AllRanks
from megatron_r1.parallel.mesh import pipeline_stage


def stage_leaders() -> list[int]:
    """Collective: the lowest rank of each pipeline stage, by stage."""
    stages = AllRanks().gather(pipeline_stage())
    return [stages.index(stage) for stage in range(max(stages) + 1)]


@dataclass(frozen=True)
class _Part:
    """Where a shard lies, as other ranks need to know it."""

    rank: int
    place: tuple[slice, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype


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
    mine_too = stage is None or stage == pipeline_stage()
    owned = [shard for shard in shards(model, of) if shard.owned and mine_too]
    yield from gather_whole(owned, next(model.parameters()).device, to_rank)


def gather_whole(owned: list[Shard], device: torch.device, to_rank: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Collective over all ranks: whole tensors from the shards that each rank speaks for; see `whole_tensors`.

    Args:
        owned: this rank's; their memory may be anywhere.
        device: where ranks send from and receive at.
    """
    mine: dict[str, list[Shard]] = {}
    for shard in owned:
        mine.setdefault(shard.name, []).append(shard)
    rank = dist.get_rank()
    for name, (shape, parts) in sorted(_directory(owned, rank).items()):
        if sum(_size(part.shape) for part in parts) != _size(shape):
            raise DataError(f"{name}: the ranks' shards do not make up the whole tensor")
        local = iter(mine.get(name, ()))
        whole = None
        for part in parts:
            if len(parts) == 1 and part.rank == rank == to_rank:
                whole = next(local).tensor
            elif rank == to_rank:
                if whole is None:
                    whole = torch.empty(shape, dtype=part.dtype, device=device)
                whole[part.place] = next(local).tensor if part.rank == rank else _receive(part, whole)
            elif part.rank == rank:
                dist.send(next(local).tensor.to(device).contiguous(), to_rank)
        if rank == to_rank:
            assert whole is not None
            yield name, whole


def _directory(owned: list[Shard], rank: int) -> dict[str, tuple[tuple[int, ...], list[_Part]]]:
    """Every rank's owned shards, by whole tensor: its shape and its parts in one order that all ranks share."""
    told = [(s.name, s.whole_shape, _Part(rank, s.place, tuple(s.tensor.shape), s.tensor.dtype)) for s in owned]
    directory: dict[str, tuple[tuple[int, ...], list[_Part]]] = {}
    for name, shape, part in (entry for entries in AllRanks().gather(told) for entry in entries):
        directory.setdefault(name, (shape, []))[1].append(part)
    return directory


def _receive(part: _Part, like: Tensor) -> Tensor:
    buffer = torch.empty(part.shape, dtype=part.dtype, device=like.device)
    dist.recv(buffer, part.rank)
    return buffer


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for extent in shape:
        size *= extent
    return size
