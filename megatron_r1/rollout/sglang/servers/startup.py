"""Starts and restarts servers: on which GPUs, and on the current weights where a folder has them, else on none."""

from __future__ import annotations

import shutil
import tempfile
from functools import partial
from pathlib import Path

from megatron_r1.config.sglang import SGLangConfig
from megatron_r1.rollout.sglang.client import Endpoint
from megatron_r1.rollout.sglang.servers.arguments import server_arguments, server_environment
from megatron_r1.rollout.sglang.servers.leftovers import remove_of_dead_servers
from megatron_r1.rollout.sglang.servers.process import Server
from megatron_r1.rollout.sglang.servers.supervise import CurrentWeights

NO_WEIGHTS = "none"
"""Version of a server that was started without weights."""
FIRST_UPDATE = "the servers have arbitrary weights until the first update"
START_TIMEOUT_S = {"cpu": 240.0, "cuda": 3600.0}
"""By device, until a started server must answer. At its first start on a GPU, SGLang compiles kernels."""
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
        name: str = "server",
    ):
        self._name = name
        self._logs, self._first_gpu, self._gpus_each = Path(logs), first_gpu, config.server.tensor_parallel
        self._arguments = partial(
            server_arguments, config=config, device=device, dtype=dtype, context_length=context_length
        )
        self._arguments(model_folder, version=NO_WEIGHTS)  # refuses before anything is started
        if not config.started_elsewhere:
            remove_of_dead_servers()
        self._environment = {} if config.started_elsewhere else server_environment(device, config.server, delta)
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
        return Server(arguments, self._environment, self._logs / f"{self._name}-{index}.log", endpoint)

    def close(self) -> None:
        """Remove the folder that is kept for restarts."""
        shutil.rmtree(self._shape, ignore_errors=True)


def first_weights(model_folder: Path, version: str) -> CurrentWeights:
    """What servers that start from a folder must serve: its weights, or, where it has none, nothing yet."""
    if any(model_folder.glob("*.safetensors")):
        return CurrentWeights([version], model_folder)
    return CurrentWeights([NO_WEIGHTS], None, inconsistent_reason=FIRST_UPDATE)
