"""What each rank holds of each weight, from megatron-core's own sharding metadata; and whole tensors from all ranks.

A whole tensor is named as a model on one rank names it, with global layer and expert numbers; a shard is this rank's
part of it. Initial weights, checkpoints, exports and weight syncs all go through here, so none of them guesses a
layout from a name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

from megatron_r1.errors import DataError
from megatron_r1.model.chunks import Model, chunks
from megatron_r1.parallel.comm import all_gather_object
from megatron_r1.parallel.mesh import pipeline_stage


@dataclass(frozen=True)
class Shard:
    """This rank's part of one whole tensor."""

    name: str
    """Of the whole tensor."""
    whole_shape: tuple[int, ...]
    offset: tuple[int, ...]
    """Where the part begins in the whole tensor."""
    tensor: Tensor
    """The part itself: a view of the model's memory."""
    owned: bool
    """Whether this rank, of all that hold this part, sends and saves it."""

    @property
    def index(self) -> tuple[slice, ...]:
        """The part as an index into the whole tensor."""
        return tuple(slice(start, start + size) for start, size in zip(self.offset, self.tensor.shape, strict=True))


def shards(model: Model, of: Callable[[Tensor], Tensor | None] = Tensor.detach) -> Iterator[Shard]:
    """This rank's shards of all weights: parameters, and the routers' balancing bias, which is a buffer.

    Args:
        of: what to show in place of a weight: the weight itself, or its gradient, which is sharded alike; None leaves
            it out.
    """
    entries = (entry for part in chunks(model) for entry in part.sharded_state_dict().values())
    for entry in entries:
        if not isinstance(entry, ShardedTensor | ShardedTensorFactory) or (value := of(entry.data)) is None:
            continue
        entry.data = value
        if isinstance(entry, ShardedTensorFactory):
            yield from map(_shard, entry.build())
        else:
            yield _shard(entry)
        entry.data = None  # the metadata of all weights lives on, what was shown of this one does not


def _shard(entry: ShardedTensor) -> Shard:
    leading = entry.prepend_axis_num
    return Shard(
        name=whole_name(entry.key, entry.global_offset[:leading]),
        whole_shape=tuple(entry.global_shape[leading:]),
        offset=tuple(entry.global_offset[leading:]),
        tensor=entry.data,
        owned=not any(entry.replica_id if isinstance(entry.replica_id, tuple) else (entry.replica_id,)),
    )


def whole_name(key: str, expert: tuple[int, ...]) -> str:
    """The name on one rank of what megatron-core's metadata calls `key`.

    Experts' weights share a key there, with the expert's number as a leading axis; multi-token layers keep an older
    name.
    """
    name = key.replace(".mlp.experts.experts.", ".mlp.experts.").replace(".transformer_layer.", ".mtp_model_layer.")
    return name + "".join(map(str, expert))


def initialise(model: Model, std: float, seed: int) -> None:
    """Draw every matrix from N(0, std) by a generator that its whole tensor's name seeds.

    Neither the layout, nor the order of construction, nor other parameters can then change a first value.
    """
    for shard in shards(model):
        if len(shard.whole_shape) < 2:
            continue
        digest = hashlib.sha256(f"{seed}/{shard.name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        whole = torch.randn(shard.whole_shape, generator=generator, dtype=torch.float32)
        shard.tensor.copy_(whole[shard.index] * std)


def load_whole_tensors(model: Model, tensors: Mapping[str, Tensor]) -> None:
    """Collective: copy every rank's part out of whole tensors.

    Raises:
        DataError: a tensor is missing, left over or has another shape.
    """
    wanted = all_gather_object({shard.name for shard in shards(model)})
    if leftover := tensors.keys() - set().union(*wanted):
        raise DataError(f"{min(leftover)}: not a tensor of this model")
    for shard in shards(model):
        shard.tensor.copy_(part_of(tensors, shard))


def part_of(tensors: Mapping[str, Tensor], shard: Shard) -> Tensor:
    """A shard's part of the whole tensor of its name.

    Raises:
        DataError: the tensor is missing or has another shape.
    """
    if shard.name not in tensors:
        raise DataError(f"{shard.name}: missing from the weights")
    whole = tensors[shard.name]
    if tuple(whole.shape) != shard.whole_shape:
        raise DataError(f"{shard.name}: has shape {tuple(whole.shape)}, must have {shard.whole_shape}")
    return whole[shard.index]


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
