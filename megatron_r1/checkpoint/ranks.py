"""The ranks of a torch.distributed job, as the store sees them."""

from __future__ import annotations

from typing import TypeVar

import torch.distributed as dist

Value = TypeVar("Value")


class AllRanks:
    """Every rank of the job: the `Ranks` of a `CheckpointStore` that all of them write to.

    Args:
        group: a group of all ranks; on CUDA a gloo one, so that small facts need no device. None: the default group.
    """

    def __init__(self, group: dist.ProcessGroup | None = None):
        self.group = group
        self.rank = dist.get_rank()

    def gather(self, value: Value) -> list[Value]:
        """Collective: each rank's value, in rank order, on every rank."""
        values: list[Value | None] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(values, value, group=self.group)
        return values  # type: ignore[return-value]
