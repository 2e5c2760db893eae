"""Collectives over all ranks of the job: flags, objects, barriers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist


def _device() -> torch.device:
    return torch.device(torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def any_rank(flag: bool) -> bool:
    """Collective: whether the flag is set on at least one rank; the same result on every rank."""
    if dist.get_world_size() == 1:
        return flag
    value = torch.tensor([float(flag)], device=_device())
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value.item())


def all_ranks(flag: bool) -> bool:
    """Collective: whether the flag is set on every rank; the same result on every rank."""
    return not any_rank(not flag)


def broadcast(value: Any, source: int = 0) -> Any:
    """Collective: the value of rank `source`, on every rank."""
    if dist.get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=source, device=_device())
    return box[0]


def receive_broadcast() -> Any:
    """The value that rank 0 broadcasts, on the other ranks."""
    return broadcast(None)


def barrier() -> None:
    """Wait until every rank has called this."""
    if dist.get_world_size() > 1:
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
    """Collective: each rank's value, in rank order, on every rank."""
    if dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def merge_by_key[Key, Value](mine: Mapping[Key, Value]) -> dict[Key, Value]:
    """Collective: all ranks' entries in one dictionary; for a key of several ranks, the highest rank's value."""
    return {key: value for entries in all_gather_object(dict(mine)) for key, value in entries.items()}


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
