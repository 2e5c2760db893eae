"""Collectives: flags, numbers, objects and barriers over all ranks of the job; arrays over a group of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_r1.parallel.mesh import data_parallel_group, same_data_groups
from megatron_r1.parallel.waiting import wait_for_all, wait_for_rank


def _device() -> torch.device:
    return torch.device(torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def any_rank(flag: bool) -> bool:
    """Collective: whether the flag is set on at least one rank; the same result on every rank.

    Ranks wait for one another as long as it takes: they come here after each step, behind what some of them do alone.
    """
    if dist.get_world_size() > 1:
        wait_for_all()
    return not all_ranks(not flag)


def all_ranks(flag: bool) -> bool:
    """Collective: whether the flag is set on every rank; the same result on every rank."""
    if dist.get_world_size() == 1:
        return flag
    value = torch.tensor([float(flag)], device=_device())
    dist.all_reduce(value, op=dist.ReduceOp.MIN)
    return bool(value.item())


def broadcast(value: Any, source: int = 0) -> Any:
    """Collective: the value of rank `source`, on every rank. The others wait for it as long as it takes."""
    if dist.get_world_size() == 1:
        return value
    wait_for_rank(source)
    box = [value]
    dist.broadcast_object_list(box, src=source, device=_device())
    return box[0]


def receive_broadcast() -> Any:
    """The value that rank 0 broadcasts, on the other ranks."""
    return broadcast(None)


def barrier() -> None:
    """Wait until every rank has called this, as long as it takes."""
    if dist.get_world_size() > 1:
        wait_for_all()
        dist.barrier()


def send_flag(rank: int, flag: bool) -> None:
    """Send a flag to one rank, which must call `recv_flag`."""
    dist.send(torch.tensor([float(flag)], device=_device()), rank)


def recv_flag(rank: int) -> bool:
    """The flag that one rank sends to this one."""
    value = torch.empty(1, device=_device())
    dist.recv(value, rank)
    return bool(value.item())


def all_gather_object[Value](value: Value) -> list[Value]:
    """Collective: each rank's value, in rank order, on every rank. Ranks wait for one another as long as it takes."""
    if dist.get_world_size() == 1:
        return [value]
    wait_for_all()
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def all_gather_numbers(mine: Sequence[float]) -> list[list[float]]:
    """Collective: each rank's numbers, in rank order, in float64 on every rank, which has as many; as one tensor."""
    if dist.get_world_size() == 1:
        return [[*mine]]
    row_N = torch.tensor(mine, dtype=torch.float64, device=_device())
    rows_RN = row_N.new_empty(dist.get_world_size() * len(mine))
    dist.all_gather_into_tensor(rows_RN, row_N)
    rows: list[list[float]] = rows_RN.view(-1, len(mine)).tolist()
    return rows


def merge_by_key[Key, Value](mine: Mapping[Key, Value]) -> dict[Key, Value]:
    """Collective: all ranks' entries in one dictionary; for a key of several ranks, the highest rank's value."""
    return {key: value for entries in all_gather_object(dict(mine)) for key, value in entries.items()}


_names: dict[str, list[str]] = {}
"""Names of each kind of numbers in the order in which they are packed, alike on every rank."""


def sum_over_ranks(kind: str, mine: Mapping[str, float]) -> dict[str, float]:
    """Collective: sums by name, in float64, the same on every rank.

    The numbers travel as one tensor. Names travel only when they are new: a rank that has others than those known of
    this kind says so in the tensor's first number.

    Args:
        kind: what the numbers are of; calls of one kind mostly have the same names.
        mine: the same names on every rank that has any; a rank with nothing to add has none.

    Raises:
        ValueError: ranks have different names.
    """
    return _reduced(kind, mine, dist.ReduceOp.SUM, absent=0.0)


def max_over_ranks(kind: str, mine: Mapping[str, float]) -> dict[str, float]:
    """Collective: largest number by name, NaN where any is NaN; otherwise as `sum_over_ranks`."""
    # A maximum passes over NaN, or not, as the backend likes: it is sent as infinity, and that it was NaN beside it.
    numbers = {name: math.inf if math.isnan(value) else value for name, value in mine.items()}
    odd = {f"{name} is NaN": float(math.isnan(value)) for name, value in mine.items()}
    found = _reduced(f"{kind} max", numbers | odd, dist.ReduceOp.MAX, absent=-math.inf)
    names = [name for name in found if f"{name} is NaN" in found]
    return {name: math.nan if found[f"{name} is NaN"] > 0 else found[name] for name in names}


def _reduced(kind: str, mine: Mapping[str, float], operation: Any, absent: float) -> dict[str, float]:
    if dist.get_world_size() == 1:
        return dict(mine)
    names = _names.get(kind, [])
    new = bool(mine) and mine.keys() != {*names}
    values = [absent] * len(names) if new or not mine else [mine[name] for name in names]
    packed = torch.tensor([float(new), *values], dtype=torch.float64, device=_device())
    dist.all_reduce(packed, operation)
    some_new, *found = packed.tolist()
    if not some_new:
        return dict(zip(names, found, strict=True))
    of_ranks = [names for names in all_gather_object(sorted(mine)) if names]
    if any(names != of_ranks[0] for names in of_ranks):
        raise ValueError(f"{kind}: ranks have different names: {of_ranks}")
    _names[kind] = of_ranks[0]
    return _reduced(kind, mine, operation, absent)


Arrays = Sequence[np.ndarray]


def scatter_over_data_parallel(arrays_of: Callable[[int], Arrays] | None) -> Arrays:
    """Collective over all ranks: each gets what rank 0 has for its rank in its data-parallel group.

    It sends to one rank for each, which broadcasts to those that work on the same data: pipeline stages, context and
    tensor ranks.

    Args:
        arrays_of: as of `scatter_arrays`; None except on rank 0.
    """
    inner = same_data_groups()
    arrays = scatter_arrays(arrays_of, data_parallel_group()) if all(group.rank() == 0 for group in inner) else ()
    for index, group in enumerate(inner):
        if all(later.rank() == 0 for later in inner[index + 1 :]):
            arrays = broadcast_arrays(arrays, group)
    return arrays


def scatter_arrays(arrays_of: Callable[[int], Arrays] | None, group: dist.ProcessGroup) -> Arrays:
    """Collective over a group: each rank gets what the group's first rank has for it.

    Args:
        arrays_of: the arrays for a rank of the group, asked for one rank after the other; None except on the first.
    """
    received: Arrays = ()
    for rank in range(1, group.size()):
        arrays = arrays_of(rank) if arrays_of else ()
        kinds = _announce(arrays, group)
        if arrays_of:
            _move(arrays, partial(_point_to_point, dist.isend, rank, group))
        elif group.rank() == rank:
            received = _empty(kinds)
            _move(received, partial(_point_to_point, dist.irecv, 0, group))
    return arrays_of(0) if arrays_of else received


def broadcast_arrays(arrays: Arrays, group: dist.ProcessGroup) -> Arrays:
    """Collective over a group: the arrays of its first rank, on each of its ranks."""
    if group.size() == 1:
        return arrays
    kinds = _announce(arrays, group)
    arrays = arrays if group.rank() == 0 else _empty(kinds)
    _move(arrays, partial(dist.broadcast, group=group, group_src=0))
    return arrays


def _announce(arrays: Arrays, group: dist.ProcessGroup) -> list[tuple[str, tuple[int, ...]]]:
    """Collective over a group: types and shapes of its first rank's arrays."""
    box = [[(array.dtype.str, array.shape) for array in arrays]]
    dist.broadcast_object_list(box, group=group, group_src=0, device=_device())
    return box[0]


def _empty(kinds: list[tuple[str, tuple[int, ...]]]) -> Arrays:
    return [np.empty(shape, kind) for kind, shape in kinds]


def _move(arrays: Arrays, transfer: Callable[[Tensor], Any]) -> None:
    """Send or receive the bytes of contiguous arrays, by way of the device of the process groups."""
    for array in arrays:
        if array.size:
            host = torch.from_numpy(array.reshape(-1).view(np.uint8))
            tensor = host.to(_device())
            transfer(tensor)
            host.copy_(tensor)


def _point_to_point(operation: Callable[..., Any], peer: int, group: dist.ProcessGroup, tensor: Tensor) -> None:
    # In a batch, NCCL uses the group's communicator, not a new one for each pair of ranks.
    for work in dist.batch_isend_irecv([dist.P2POp(operation, tensor, group=group, group_peer=peer)]):
        work.wait()


class AllRanks:
    """All ranks of the job, as the `Ranks` of `checkpoint.store`."""

    @property
    def rank(self) -> int:
        return dist.get_rank()

    @property
    def size(self) -> int:
        return dist.get_world_size()

    def gather[Value](self, value: Value) -> list[Value]:
        return all_gather_object(value)
