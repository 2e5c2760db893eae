"""How long a planned sync takes on a cluster, and what no way of sending could be faster than.

The model of time: a message takes its latency and its bytes over the bandwidth of the link that it crosses. A broadcast
is pipelined through its receivers, as NCCL does it in large pieces, so that it takes as long as one hop. Stages take
turns, bucket by bucket, and a stage gathers its next bucket while others send. Copies within a device, and loading
what has arrived, are not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_r1.rollout.sync.group_sender import round_robin
from megatron_r1.rollout.sync.plan.traffic import StageTraffic

GB = 1e9


@dataclass(frozen=True)
class Cluster:
    """Nodes that are all alike; ranks fill them in order, first the trainer's, then servers' on nodes of their own."""

    gpus_per_node: int = 8
    intra_node_gbs: float = 450.0
    """GB/s (10^9 bytes) from one GPU to another of its node."""
    inter_node_gbs: float = 50.0
    """GB/s from one GPU to another node: of one network card."""
    latency_s: float = 20e-6
    """Seconds of one message between ranks, without its bytes."""
    bucket_s: float = 5e-3
    """Seconds of one bucket, without its bytes: the HTTP call that announces it, and its reply."""

    def seconds(self, nbytes: float, one: int, other: int) -> float:
        """Seconds of so many bytes between two trainer ranks, without latency."""
        near = one // self.gpus_per_node == other // self.gpus_per_node
        return nbytes / GB / (self.intra_node_gbs if near else self.inter_node_gbs)


@dataclass(frozen=True)
class Prediction:
    """Seconds of one sync."""

    total_s: float
    broadcast_s: float
    """Of those that servers spend receiving."""
    gather_s: float
    """What the stage that gathers longest spends on it."""
    bound_receive_s: float
    """Lower bound: what the fullest rank of a server keeps, over the bandwidth of its network card."""
    bound_send_s: float
    """Lower bound: all that is sent, once, over the bandwidth of all the trainer's network cards."""

    @property
    def bound_s(self) -> float:
        """Both must happen, and may at the same time."""
        return max(self.bound_receive_s, self.bound_send_s)


def predict(stages: Sequence[StageTraffic], ranks: int, needed: int, cluster: Cluster) -> Prediction:
    """Seconds of one sync.

    Args:
        stages: what each pipeline stage sends.
        ranks: of the trainer.
        needed: bytes that the fullest rank of a server keeps.
        cluster: where all of them are.
    """
    gathers = [
        stage.messages * cluster.latency_s
        + sum(cluster.seconds(size, rank, stage.leader) for rank, size in stage.gathered.items())
        for stage in stages
    ]
    ready = [gather * _share(stage, 0) for stage, gather in zip(stages, gathers, strict=True)]
    now = sending = 0.0
    for number, place in round_robin([len(stage.buckets) for stage in stages]):
        stage = stages[place]
        took = cluster.bucket_s + stage.buckets[number] / GB / cluster.inter_node_gbs
        now = max(now, ready[place]) + took
        sending += took
        ready[place] = now + gathers[place] * _share(stage, number + 1)
    sent = sum(stage.nbytes for stage in stages)
    return Prediction(
        total_s=now,
        broadcast_s=sending,
        gather_s=max(gathers),
        bound_receive_s=needed / GB / cluster.inter_node_gbs,
        bound_send_s=sent / GB / (cluster.inter_node_gbs * ranks),
    )


def _share(stage: StageTraffic, number: int) -> float:
    """What part of a stage's bytes one of its buckets is; 0 past the last."""
    return stage.buckets[number] / stage.nbytes if number < len(stage.buckets) else 0.0
