"""How a server is started, now and again: on the current weights where they are in a folder, else on none."""

from __future__ import annotations

import shutil
import tempfile
from functools import partial
from pathlib import Path

from megatron_r1.config.sglang import SGLangConfig
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
    ):
        self._logs, self._first_gpu, self._gpus_each = Path(logs), first_gpu, config.server.tensor_parallel
        self._arguments = partial(
            server_arguments, config=config, device=device, dtype=dtype, context_length=context_length
        )
        self._arguments(model_folder, version=NO_WEIGHTS)  # refuses before anything is started
        self._environment = (
            {} if config.started_elsewhere else server_environment(device, config.server.tensor_parallel)
        )
        self._shape = Path(tempfile.mkdtemp(prefix="megatron_r1-shape-"))
        for name in SHAPE:
            if (Path(model_folder) / name).is_file():
                shutil.copyfile(Path(model_folder) / name, self._shape / name)

    def launch(self, place: int, endpoint: Endpoint, weights: CurrentWeights) -> Server:
        """Start server number `place` at `endpoint`."""
        gpu = self._first_gpu + place * self._gpus_each
        if folder := weights.folder:
            arguments = self._arguments(folder, version=weights.version, first_gpu=gpu)
        else:
            arguments = self._arguments(self._shape, version=NO_WEIGHTS, weights=False, first_gpu=gpu)
        return Server(arguments, self._environment, self._logs / f"server-{place}.log", endpoint)

    def close(self) -> None:
        """Remove what was kept for restarts."""
        shutil.rmtree(self._shape, ignore_errors=True)
