"""What travels in one weight sync: between which ranks, and how much.

Computed from what really decides it: the directory of shards, the table of names and number formats (`Outgoing`), what
belongs together, and how buckets are cut.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from megatron_r1.model.shards import ShardDirectory
from megatron_r1.rollout.sync.buckets import plan_buckets
from megatron_r1.rollout.sync.payload import WeightPayload
from megatron_r1.rollout.sync.plan.layout import expert_number, tensor_split
from megatron_r1.rollout.sync.strategies import parts_of_stages


@dataclass(frozen=True)
class Engines:
    """The servers, all alike."""

    count: int = 1
    tensor_parallel: int = 1
    """Ranks of one server."""
    expert_parallel: int = 1
    """Ranks, of those, that the experts are divided among; the rest of the division is within each expert."""

    @property
    def ranks(self) -> int:
        return self.count * self.tensor_parallel


@dataclass(frozen=True)
class StageTraffic:
    """What one pipeline stage sends."""

    leader: int
    """The rank that sends to the servers."""
    gathered: Mapping[int, int]
    """Bytes that the leader gets of other ranks of its stage, by rank."""
    messages: int
    """In how many messages."""
    buckets: list[int]
    """Bytes of each bucket that it broadcasts to every rank of every server."""

    @property
    def nbytes(self) -> int:
        return sum(self.buckets)


def traffic(
    everything: ShardDirectory, stages: list[int], payload: WeightPayload, bucket_bytes: int
) -> list[StageTraffic]:
    """By pipeline stage, what one sync sends.

    Args:
        everything: all ranks' shards.
        stages: each rank's pipeline stage.
        payload: what is sent.
        bucket_bytes: most bytes of one bucket.
    """
    found = []
    for stage, part in enumerate(parts_of_stages(everything, stages, payload)):
        leader = stages.index(stage)
        gathered: Counter[int] = Counter()
        others = [one for _, held in part.values() for one in held if one.rank != leader]
        for one in others:
            gathered[one.rank] += prod(one.shape) * one.dtype.itemsize
        buckets = plan_buckets(payload.planned_groups(part), bucket_bytes)
        sizes = [sum(item.nbytes for item in bucket) for bucket in buckets]
        found.append(StageTraffic(leader, dict(sorted(gathered.items())), len(others), sizes))
    return found


def needed_by_a_rank(payload: WeightPayload, engines: Engines) -> int:
    """Bytes of the weights that the fullest rank of a server keeps: its share of what is shared, the rest whole."""
    total = 0
    for native in payload.names():
        size, expert = sum(item.nbytes for item in payload.entries(native)), expert_number(native)
        shares = engines.tensor_parallel if expert is not None or tensor_split(native) is not None else 1
        total += -(-size // shares)
    return total
