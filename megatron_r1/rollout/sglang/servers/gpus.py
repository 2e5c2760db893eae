"""Which GPUs of this machine the servers take that are started here."""

from __future__ import annotations

from megatron_r1.config.rollout import RolloutConfig
from megatron_r1.errors import ConfigError


def first_gpu(rollout: RolloutConfig, gpus: int, trainers: int) -> int:
    """The first GPU of the first server; every server takes `tensor_parallel` in a row, the next one those after it.

    Colocated servers take the trainer's own, from the first. Others take those behind the trainer's, as long as there
    are enough; where there are not, all of them from the first, and share memory with the trainer as best they can.

    Args:
        gpus: of this machine.
        trainers: ranks of the trainer on this machine, on a GPU each, from the first.

    Raises:
        ConfigError: there are too few.
    """
    sglang = rollout.sglang
    needed, wanted = sglang.servers * sglang.server.tensor_parallel, sglang.first_gpu
    behind = rollout.placement == "separate" and trainers + needed <= gpus
    first = wanted if wanted >= 0 else trainers if behind else 0
    if first + needed > gpus:
        allowed = f"must fit from GPU {first} on, {sglang.server.tensor_parallel} to a server: there are {gpus} GPUs"
        raise ConfigError("rollout.sglang.servers", sglang.servers, allowed)
    return first
