"""SGLang servers as a rollout engine.

Log-probs: at temperature T they are of log_softmax(logits / T) over the whole vocabulary, before top-p; at T = 1 and
top-p 1 exactly the policy's own. Greedy sampling (T = 0) gives log_softmax(logits). `Sampling.seed` is not used:
SGLang on these backends draws from one generator that all requests of a server share.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from megatron_r1.config.rollout import SGLangConfig
from megatron_r1.errors import ConfigError, NoRolloutCapacity
from megatron_r1.rollout.sample import Completion, Request, Sampling
from megatron_r1.rollout.sglang import cpu
from megatron_r1.rollout.sglang.client import Client
from megatron_r1.rollout.sglang.server import Server

SPARE_TOKENS = 8
"""SGLang keeps a few positions of the context for itself."""


class SGLangEngine:
    """`config.servers` servers of one model; a context manager.

    Args:
        model_folder: Hugging Face folder that SGLang can serve (config.json and safetensors; no tokenizer needed).
        config: servers and their limits.
        log_folder: the servers' output goes to ``server-N.log`` in it.
        device: ``cpu`` or ``cuda``.
        dtype: ``float32`` or ``bfloat16``, of weights and activations.
        tensor_parallel: ranks of one server.
        context_length: longest prompt and response together, in tokens.
        version: weight version that the model in `model_folder` is called.

    Raises:
        NoRolloutCapacity: a server did not start, ended, or did not answer as it should.
    """

    def __init__(
        self,
        model_folder: Path,
        config: SGLangConfig,
        log_folder: Path,
        device: str,
        dtype: str,
        tensor_parallel: int = 1,
        *,
        context_length: int,
        version: str = "initial",
    ):
        self.config, self.context_length, self.version = config, context_length, version
        self.servers: list[Server] = []
        if not (Path(model_folder) / "config.json").is_file():
            raise NoRolloutCapacity(f"{model_folder}: no model to serve: the folder has no config.json")
        arguments = server_arguments(
            model_folder, config, device=device, dtype=dtype, tensor_parallel=tensor_parallel,
            context_length=context_length, version=version,
        )  # fmt: skip
        variables = server_environment(device, tensor_parallel)
        deadline = time.monotonic() + config.start_timeout_s
        try:
            for index in range(config.servers):
                self.servers.append(Server(arguments, variables, Path(log_folder) / f"server-{index}.log"))
            for server in self.servers:
                server.wait_until_listening(deadline)
            self._clients = [
                Client(server.url, server.api_key, server.admin_key, config.request_timeout_s)
                for server in self.servers
            ]
            self._on_all([client.weight_version() for client in self._clients])
        except BaseException:
            self.close()
            raise

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """One completion for each request, in their order; see the module's docstring for the log-probs.

        Requests with one prompt go to one server when they stand together, so that it reads the prompt once.
        """
        for request in requests:
            if (length := len(request.prompt_tokens)) + sampling.max_tokens > self.context_length:
                raise ConfigError(
                    "rollout.max_response_tokens", sampling.max_tokens,
                    f"with the {length} prompt tokens of request {request.id} at most {self.context_length} in all",
                )  # fmt: skip
        shares = divide(requests, len(self.servers))
        calls = [
            client.generate(share, sampling, self.version)
            for client, share in zip(self._clients, shares, strict=True)
            if share
        ]
        return [completion for share in self._on_all(calls) for completion in share]

    def update_weights(self, folder: Path, version: str) -> None:
        """Load the weights of `folder` into all servers at once; each drops its cache and confirms `version`."""
        path = str(Path(folder).resolve())
        self._on_all([client.update_weights(path, version) for client in self._clients])
        self.version = version

    def check(self) -> None:
        """Raise NoRolloutCapacity when a server has ended."""
        for server in self.servers:
            server.check()

    def close(self) -> None:
        """Kill all servers with everything that they spawned."""
        for server in self.servers:
            server.close()
        self.servers = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def _on_all(self, calls: Sequence[Any]) -> list[Any]:
        """Run calls at the same time; the first failure ends the others. A dead server's own reason is told first."""

        async def together() -> list[Any]:
            return await asyncio.gather(*calls)

        try:
            return asyncio.run(together())
        except NoRolloutCapacity:
            self.check()
            raise


def server_arguments(
    model_folder: Path,
    config: SGLangConfig,
    *,
    device: str,
    dtype: str,
    tensor_parallel: int,
    context_length: int,
    version: str,
) -> dict[str, Any]:
    """Fields of SGLang's ServerArgs: token ids in and out, no network, idle servers sleep."""
    arguments: dict[str, Any] = {
        "model_path": str(Path(model_folder).resolve()),
        "device": device,
        "dtype": dtype,
        "tp_size": tensor_parallel,
        "context_length": context_length + SPARE_TOKENS,
        "weight_version": version,
        "max_running_requests": config.max_running_requests,
        "max_total_tokens": config.max_total_tokens,
        "skip_tokenizer_init": True,
        "skip_server_warmup": True,
        "sleep_on_idle": True,
        "log_level": "info",
        "log_level_http": "warning",
    }
    if device == "cpu":
        arguments |= {"attention_backend": "torch_native", "disable_cuda_graph": True}
    return arguments


def server_environment(device: str, tensor_parallel: int) -> dict[str, str]:
    """Environment variables of the servers, beside those of this process."""
    variables = {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1",  # for SPARE_TOKENS, which no request reaches
    }
    if device == "cpu":
        variables |= cpu.environment(tensor_parallel)
    return variables


def divide(requests: Sequence[Request], shares: int) -> list[list[Request]]:
    """Cut requests into contiguous shares of about equal cost, between prompts rather than within one's run.

    The cost of a run is its number of requests. With fewer runs than shares, runs are cut after all.
    """
    runs = [list(run) for _, run in groupby(requests, key=lambda request: request.prompt_tokens)]
    if len(runs) < shares:
        runs = [[request] for request in requests]
    divided: list[list[Request]] = [[] for _ in range(shares)]
    done = 0
    for run in runs:
        middle = done + len(run) / 2
        divided[min(int(middle * shares / len(requests)), shares - 1)].extend(run)
        done += len(run)
    return divided
