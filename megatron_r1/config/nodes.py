"""Nodes and GPUs of a job: which the trainer takes, and where its servers run."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_r1.config.rollout import RolloutConfig
from megatron_r1.errors import ConfigError


@dataclass(frozen=True, slots=True)
class JobNodes:
    """Nodes of a job."""

    trainer: int
    """Nodes of the trainer, or the one node of a verb that does not train."""
    engine: int = 0
    """Nodes that run servers alone."""

    @property
    def total(self) -> int:
        return self.trainer + self.engine


def nodes_of(rollout: RolloutConfig | None, ranks: int, ranks_per_node: int, gpus_per_node: int) -> JobNodes:
    """The nodes that a job needs. Servers take GPUs of the trainer's first node where these suffice, else own nodes.

    Args:
        rollout: how a training job samples; None where it does not.
        ranks: of the trainer.
        ranks_per_node: of the trainer.
        gpus_per_node: 0 for nodes without GPUs, on which servers run beside the trainer.

    Raises:
        ConfigError: a server has more ranks than a node has GPUs, or servers that share the trainer's do not fit there.
    """
    trainer = -(-ranks // ranks_per_node)
    if not rollout or not gpus_per_node or not starts_servers(rollout):
        return JobNodes(trainer)
    each = servers_per_node(rollout, gpus_per_node)
    try:
        first_gpu(rollout, gpus_per_node, min(ranks, ranks_per_node))
    except ConfigError:
        if rollout.placement == "colocated" or rollout.sglang.first_gpu >= 0:
            raise
        return JobNodes(trainer, -(-rollout.sglang.servers // each))
    return JobNodes(trainer)


def starts_servers(rollout: RolloutConfig) -> bool:
    """Whether the job itself starts the servers."""
    return rollout.engine == "sglang" and not rollout.sglang.started_elsewhere


def servers_per_node(rollout: RolloutConfig, gpus: int) -> int:
    """Servers of a node of their own: as many as its GPUs carry; on nodes without GPUs those of the configuration.

    Raises:
        ConfigError: a server does not fit on a node.
    """
    ranks = rollout.sglang.server.tensor_parallel
    if not gpus:
        return rollout.sglang.servers
    if ranks > gpus:
        allowed = f"must be at most {gpus}, the GPUs of a node: a server does not span nodes"
        raise ConfigError("rollout.sglang.server.tensor_parallel", ranks, allowed)
    return gpus // ranks


def first_gpu(rollout: RolloutConfig, gpus: int, trainers: int) -> int:
    """The first GPU of the first server; each server takes the next `tensor_parallel` GPUs.

    Colocated servers take the trainer's own, from the first. Others take those after the trainer's; only the one GPU of
    a machine is shared.

    Args:
        gpus: number of GPUs that the process that starts them may use.
        trainers: ranks of the trainer on this machine, on one GPU each, from the first; 0 where nothing is trained.

    Raises:
        ConfigError: there are too few.
    """
    sglang = rollout.sglang
    needed, requested = sglang.servers * sglang.server.tensor_parallel, sglang.first_gpu
    first = requested if requested >= 0 else trainers if rollout.placement == "separate" else 0
    if requested < 0 and gpus == trainers == needed == 1:
        return 0
    if first + needed > gpus:
        of_their_own = requested < 0 < first
        allowed = (
            f"must fit from GPU {first} on, {sglang.server.tensor_parallel} to a server: there are {gpus} GPUs"
            + f", of which {trainers} are the trainer's; rollout.sglang.first_gpu=0 shares them" * of_their_own
        )
        raise ConfigError("rollout.sglang.servers", sglang.servers, allowed)
    return first
