"""Starts and restarts servers: on which GPUs, and on the current weights where a folder has them, else on none."""

from __future__ import annotations

import shutil
import tempfile
from functools import partial
from pathlib import Path

from megatron_r1.config.rollout import RolloutConfig
from megatron_r1.config.sglang import SGLangConfig
from megatron_r1.errors import ConfigError
from megatron_r1.rollout.sglang.client import Endpoint
from megatron_r1.rollout.sglang.servers.arguments import server_arguments, server_environment
from megatron_r1.rollout.sglang.servers.process import Server
from megatron_r1.rollout.sglang.servers.supervise import CurrentWeights

NO_WEIGHTS = "none"
"""Version of a server that was started without weights."""
SHAPE = ("config.json", "generation_config.json")
"""What a server needs to start without weights."""


class ServerFactory:
    """Starts the servers of one engine; arguments are those of the engine.

    Raises:
        ConfigError: an option that this device does not offer.
    """

    def __init__(
        self,
        model_folder: Path,
        config: SGLangConfig,
        logs: Path,
        device: str,
        dtype: str,
        context_length: int,
        first_gpu: int = 0,
        delta: bool = False,
    ):
        self._logs, self._first_gpu, self._gpus_each = Path(logs), first_gpu, config.server.tensor_parallel
        self._arguments = partial(
            server_arguments, config=config, device=device, dtype=dtype, context_length=context_length
        )
        self._arguments(model_folder, version=NO_WEIGHTS)  # refuses before anything is started
        self._environment = (
            {} if config.started_elsewhere else server_environment(device, config.server.tensor_parallel, delta)
        )
        self._shape = Path(tempfile.mkdtemp(prefix="megatron_r1-shape-"))
        for name in SHAPE:
            if (Path(model_folder) / name).is_file():
                shutil.copyfile(Path(model_folder) / name, self._shape / name)

    def launch(self, index: int, endpoint: Endpoint, weights: CurrentWeights) -> Server:
        """Start server number `index` at `endpoint`."""
        gpu = self._first_gpu + index * self._gpus_each
        if folder := weights.folder:
            arguments = self._arguments(folder, version=weights.version, first_gpu=gpu)
        else:
            arguments = self._arguments(self._shape, version=NO_WEIGHTS, weights=False, first_gpu=gpu)
        return Server(arguments, self._environment, self._logs / f"server-{index}.log", endpoint)

    def close(self) -> None:
        """Remove the folder that is kept for restarts."""
        shutil.rmtree(self._shape, ignore_errors=True)


def first_gpu(rollout: RolloutConfig, gpus: int, trainers: int) -> int:
    """The first GPU of the first server; each server takes the next `tensor_parallel` GPUs.

    Colocated servers take the trainer's own, from the first. Others take those after the trainer's, where there are
    enough; else they take GPUs from the first on, and share memory with the trainer.

    Args:
        gpus: number of GPUs of this machine.
        trainers: ranks of the trainer on this machine, on one GPU each, from the first.

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
