"""SGLang servers as a rollout engine.

Log-probs: at temperature T they are of log_softmax(logits / T) over the whole vocabulary, before top-p; at T = 1 and
top-p 1 exactly the policy's own. Greedy sampling (T = 0) gives log_softmax(logits). `Sampling.seed` is not used:
SGLang on these backends draws from one generator that all requests of a server share.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from megatron_r1.config.rollout import SGLangConfig
from megatron_r1.errors import ConfigError, NoRolloutCapacity
from megatron_r1.rollout.sample import Completion, Request, Sampling
from megatron_r1.rollout.sglang import cpu
from megatron_r1.rollout.sglang.client import Client, Endpoint
from megatron_r1.rollout.sglang.pause import FINISH, Pause
from megatron_r1.rollout.sglang.server import Server

CLOSE_SESSION_S = 10.0
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
        self.tensor_parallel = tensor_parallel
        self._in_use = threading.RLock()
        self._doubt = ""
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
            self._clients = [Client.at(endpoint, config.request_timeout_s) for endpoint in self.endpoints]
            self._on_all([client.weight_version() for client in self._clients])
        except BaseException:
            self.close()
            raise

    @property
    def endpoints(self) -> list[Endpoint]:
        """The servers, for senders of weights in this process or another."""
        return [server.endpoint for server in self.servers]

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """One completion for each request, in their order; see the module's docstring for the log-probs.

        Requests with one prompt go to one server when they stand together, so that it reads the prompt once.
        Waits while weights are being received; after an update that failed half way there are no answers until one
        succeeds.
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
        with self._in_use:
            if self._doubt:
                for call in calls:
                    call.close()
                raise NoRolloutCapacity(self._doubt)
            return [completion for share in self._on_all(calls) for completion in share]

    def update_weights(self, folder: Path, version: str) -> None:
        """Load the weights of `folder` into all servers at once; each drops its cache and confirms `version`."""
        path = str(Path(folder).resolve())
        with self._in_use:
            if self._doubt:
                self._close_sessions()
            self._on_all([client.update_weights(path, version) for client in self._clients])
            self.version, self._doubt = version, ""

    @contextmanager
    def receiving(self, version: str, pause: Pause = FINISH) -> Iterator[None]:
        """The session in which senders send new weights to `endpoints`, in turns; servers are paused as `pause` says.

        At the end of the block every server must say that it serves `version`, so the last sender stamps it. When the
        block or a server fails, some weights may be new and others old: `version` stays what it was and `generate`
        refuses, until another update succeeds.
        """
        with self._in_use:
            if self._doubt:
                self._close_sessions()
            self._doubt = f"the servers' weights are of no one version: the update to {version!r} was not completed"
            try:
                if pause.mode:
                    self._on_all([client.pause(pause.mode) for client in self._clients])
                self._on_all([client.begin_update() for client in self._clients])
                yield
                self._on_all([client.end_update() for client in self._clients])
                self._on_all([client.confirm(version) for client in self._clients])
            except BaseException as error:
                self._close_sessions()
                if isinstance(error, NoRolloutCapacity):
                    self.check()
                raise
            finally:
                if pause.mode:
                    self._resume()
            self.version, self._doubt = version, ""

    def checksums(self) -> dict[str, str]:
        """Checksum of every weight, by SGLang's name.

        Raises:
            NoRolloutCapacity: two servers differ.
        """
        first, *others = self._on_all([client.checksums() for client in self._clients])
        for client, other in zip(self._clients[1:], others, strict=True):
            if differing := sorted(name for name in first.keys() | other.keys() if first.get(name) != other.get(name)):
                raise NoRolloutCapacity(f"{client.url}: {len(differing)} weights are not the first server's: "
                                        f"{', '.join(differing[:3])}")  # fmt: skip
        return first

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

    def _close_sessions(self) -> None:
        """Close sessions that a failed update left open. A server that cannot will say so at the next update."""
        for endpoint in self.endpoints:
            with contextlib.suppress(NoRolloutCapacity):
                asyncio.run(Client.at(endpoint, CLOSE_SESSION_S).end_update())

    def _resume(self) -> None:
        """Let paused servers go on, also after an update that failed: others may wait for their answers."""
        for endpoint in self.endpoints:
            with contextlib.suppress(NoRolloutCapacity):
                asyncio.run(Client.at(endpoint, CLOSE_SESSION_S).resume())

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
