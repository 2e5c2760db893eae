"""SGLang servers as a rollout engine: life cycle and generation; updates of the weights are in weight_session.py.

Log-probs: at temperature T they are of log_softmax(logits / T) over the whole vocabulary, before top-p; at T = 1 and
top-p 1 exactly the policy's own. Greedy sampling (T = 0) gives log_softmax(logits). `Sampling.seed` is not used:
SGLang on these backends draws from one generator that all requests of a server share.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from megatron_r1.config.sglang import SGLangConfig
from megatron_r1.errors import NoRolloutCapacity
from megatron_r1.rollout.engine import Outcome, Request, Sampling, check_lengths
from megatron_r1.rollout.sglang.client import Client, Endpoint, new_session, run_all
from megatron_r1.rollout.sglang.pause import FINISH, Pause
from megatron_r1.rollout.sglang.pool.pool import Pool
from megatron_r1.rollout.sglang.pool.router import Router
from megatron_r1.rollout.sglang.pool.server import PoolServer
from megatron_r1.rollout.sglang.servers.discovery import external_endpoints
from megatron_r1.rollout.sglang.servers.engine_memory import EngineMemory
from megatron_r1.rollout.sglang.servers.memory import IN_TRAINER_PHASE
from megatron_r1.rollout.sglang.servers.process import Server, new_endpoints
from megatron_r1.rollout.sglang.servers.startup import START_TIMEOUT_S, ServerFactory, first_weights
from megatron_r1.rollout.sglang.servers.supervise import SupervisedServer, supervised
from megatron_r1.rollout.sglang.weight_session import WeightSession


class SGLangEngine:
    """The servers of a configuration, of one model; a context manager.

    Servers that die or hang are restarted. While a folder holds their weights they load them from there; weights that
    came over a process group come again with the next update, until which the server takes no requests.

    Args:
        model_folder: Hugging Face folder that SGLang can serve (config.json and safetensors; no tokenizer needed).
            Without safetensors the servers start on arbitrary weights and generate after the first update.
        config: servers and their limits.
        log_folder: the servers' output goes to ``server-N.log`` in it.
        device: ``cpu`` or ``cuda``.
        dtype: ``float32`` or ``bfloat16``, of weights and activations.
        context_length: longest prompt and response together, in tokens.
        version: weight version of the model in `model_folder`.
        pause: what happens to responses in flight when weights change.
        first_gpu: of the first server; without effect on a CPU.
        delta: whether servers must take deltas of their weights (rollout/sync/delta.py).

    Raises:
        NoRolloutCapacity: a server did not start, ended, or did not answer correctly.
        ConfigError: an option that this device does not offer.
    """

    def __init__(
        self,
        model_folder: Path,
        config: SGLangConfig,
        log_folder: Path,
        device: str,
        dtype: str,
        *,
        context_length: int,
        version: str = "initial",
        pause: Pause = FINISH,
        first_gpu: int = 0,
        delta: bool = False,
    ):
        config = replace(config, start_timeout_s=config.start_timeout_s or START_TIMEOUT_S[device])
        self.config, self.context_length = config, context_length
        self.tensor_parallel = config.server.tensor_parallel
        if not (Path(model_folder) / "config.json").is_file():
            raise NoRolloutCapacity(f"{model_folder}: no model to serve: the folder has no config.json")
        self._factory = ServerFactory(model_folder, config, log_folder, device, dtype, context_length, first_gpu, delta)
        self.endpoints = external_endpoints(config) if config.started_elsewhere else new_endpoints(config.servers)
        """The servers, for senders of weights in this process or another; a restarted server keeps its own."""
        self._weights = first_weights(Path(model_folder), version)
        self._background = Background("sglang-pool")
        self._stack: AsyncExitStack | None = None
        self._servers: list[SupervisedServer] = []
        try:
            self._background.run(self._start(pause))
        except BaseException:
            self.close()
            raise

    @property
    def version(self) -> str:
        """Version of the weights that completions come from."""
        return self._weights.version

    @property
    def weights_folder(self) -> Path | None:
        """Folder that holds the servers' current weights; None where only memory does."""
        return self._weights.folder

    @property
    def servers(self) -> list[Server]:
        """The processes that this program started."""
        return [one.process for one in self._servers if one.process]

    @property
    def restarts(self) -> int:
        """Restarts of servers since the start."""
        return sum(one.restarts for one in self._servers)

    @property
    def busy_seconds(self) -> float:
        """Seconds since the start in which a server had requests in flight, the mean over servers."""
        servers = self._pool.servers
        return sum(server.busy.seconds for server in servers) / len(servers)

    def health(self) -> dict[str, int]:
        """Requests sent, answered, failed and resent, and restarts of servers, all since the start."""
        counts = self._pool.counts
        return {name: counts[name] for name in ("sent", "answered", "failed", "resent")} | {"restarts": self.restarts}

    @property
    def pause(self) -> Pause:
        """What happens to responses in flight when weights change; may be set between two updates."""
        return self._session.pause

    @pause.setter
    def pause(self, pause: Pause) -> None:
        self._session.pause = pause

    def progress(self) -> list[tuple[int, int]]:
        """For each server the requests that it has answered since it was last opened, and those in flight."""
        return [(one.server.answered, one.server.in_flight) for one in self._servers]

    def states(self) -> list[str]:
        """For each server why it takes no requests; empty where it does."""
        return [one.server.closed_because for one in self._servers]

    def weight_versions(self) -> list[str]:
        """For each server the weight version that it reports."""
        return self._background.run(run_all([client.weight_version() for client in self._clients]))

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Outcome]:
        """The outcome of each request, in order; see the module's docstring for the log-probs.

        Requests with one prompt go to one server when they are neighbours, so that it prefills the prompt once. Several
        threads may call; servers get requests in the order of the calls. Nothing is sent while weights are updated;
        after an update that failed half way no server generates until one succeeds.
        """
        check_lengths(requests, sampling, self.context_length)
        if self._stack is None:
            raise NoRolloutCapacity("the servers were stopped")
        return self._background.run(self._generate(requests, sampling))

    def abandon(self) -> None:
        """End all calls of `generate` that threads are in: there they raise NoRolloutCapacity."""
        self._background.loop.call_soon_threadsafe(self._pool.abandon)

    def load_weights(self, folder: Path, version: str) -> None:
        """Load the weights of `folder` into all servers at once; each drops its cache and confirms `version`.

        A server that is down loads them when it is back.

        Raises:
            NoRolloutCapacity: a server refused them.
        """
        self._background.run(self._session.load(Path(folder), version))

    @contextmanager
    def receiving(self, version: str) -> Iterator[None]:
        """The session in which senders send new weights to `endpoints`, one after the other.

        At the end of the block every server must report `version`, so the last sender stamps it. When the block or a
        server fails, some weights may be new and others old: `version` stays what it was and `generate` refuses, until
        another update succeeds. Waits for servers that are restarting.
        """
        run, session = self._background.run, self._session.receiving(version)
        run(session.__aenter__())
        try:
            yield  # the loop serves replies and health checks meanwhile
        except BaseException as error:
            run(session.__aexit__(type(error), error, error.__traceback__))
            raise
        run(session.__aexit__(None, None, None))

    @property
    def has_dead_server(self) -> bool:
        """Whether a server has ended and waits for the engine's phase (`resume_memory`, `restart_dead`)."""
        return self._memory.has_dead_server

    def release_memory(self) -> None:
        """Free the servers' memory for a trainer, once they have answered; until it is resumed they cannot generate.

        A server that fails is killed, so that the memory is free when this returns. Its content is lost: an update of
        the weights must follow when it is resumed.
        """
        self._background.run(self._memory.release())

    def resume_memory(self, tags: Sequence[str]) -> None:
        """Allocate memory again; a server that fails is restarted, and then holds all of its own.

        Args:
            tags: `memory.WEIGHTS` before an update of the weights, `memory.CACHE` after it.
        """
        self._background.run(self._memory.resume(tags))

    def restart_dead(self) -> None:
        """Restart the servers that ended in the trainer's phase; afterwards the memory of all is released."""
        self._background.run(self._memory.restart_dead())

    def checksums(self) -> dict[str, str]:
        """Checksum of every weight, by SGLang's name.

        Raises:
            NoRolloutCapacity: two servers differ.
        """
        first, *others = self._background.run(run_all([client.checksums() for client in self._clients]))
        for client, other in zip(self._clients[1:], others, strict=True):
            if differing := sorted(name for name in first.keys() | other.keys() if first.get(name) != other.get(name)):
                raise NoRolloutCapacity(f"{client.url}: {len(differing)} weights are not the first server's: "
                                        f"{', '.join(differing[:3])}")  # fmt: skip
        return first

    def check(self) -> None:
        """Raise NoRolloutCapacity, with the reason, when a server is down."""
        for one in self._servers:
            one.check()

    def close(self) -> None:
        """Kill all servers with everything that they spawned; may be called twice."""
        if self._stack:
            stack, self._stack = self._stack, None
            self._background.run(stack.aclose())
        self._servers = []
        self._background.close()
        self._factory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    @property
    def _clients(self) -> list[Client]:
        return [one.server.client for one in self._servers]

    async def _start(self, pause: Pause) -> None:
        self._stack = AsyncExitStack()
        http = await self._stack.enter_async_context(new_session())
        timeout_s, config, weights = self.config.request_timeout_s, self.config.pool, self._weights
        servers = [PoolServer(Client.at(endpoint, timeout_s, http), config) for endpoint in self.endpoints]
        router = None
        if self.config.router:
            front = Endpoint(self.config.router, self.endpoints[0].api_key, "")
            router = PoolServer(Client.at(front, timeout_s, http), config, version=None)
        self._pool = Pool([router] if router else servers, config, timeout_s, weights.versions, self._hopeless)
        self._servers = [
            SupervisedServer(server, self.config, weights, self._pool.changed, self._launcher(index))
            for index, server in enumerate(servers)
        ]
        self._memory = EngineMemory(self._servers, self._pool, weights)
        self._session = WeightSession(self._servers, self.endpoints, self._pool, router, self._memory, weights, pause)
        for one in self._servers:
            self._stack.push_async_callback(one.stop)
            one.launch()
        await run_all([one.come_up() for one in self._servers])
        await run_all([one.rejoin(first=True) for one in self._servers])
        await self._stack.enter_async_context(supervised(self._servers))
        if router:
            await self._register_at(Router(self.config.router, http), self._stack)
            if not weights.inconsistent_reason:
                router.open()

    def _launcher(self, index: int) -> Callable[[], Server] | None:
        if self.config.started_elsewhere:
            return None
        return partial(self._factory.launch, index, self.endpoints[index], self._weights)

    async def _register_at(self, router: Router, stack: AsyncExitStack) -> None:
        """Register the servers that take requests at the router, now and whenever that changes."""
        ours = {endpoint.url for endpoint in self.endpoints}

        def taking_requests() -> dict[str, Endpoint]:
            pairs = zip(self._servers, self.endpoints, strict=True)
            return {endpoint.url: endpoint for one, endpoint in pairs if not one.server.closed_because}

        await router.set_workers(taking_requests(), ours)
        following = asyncio.ensure_future(router.follow(taking_requests, ours, self._pool.changed))

        async def leave() -> None:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
            with contextlib.suppress(NoRolloutCapacity):
                await router.set_workers({}, ours)

        stack.push_async_callback(leave)

    def _hopeless(self) -> str:
        if all(one.memory.released and not (one.gone() or one.given_up) for one in self._servers):
            return IN_TRAINER_PHASE
        if all(one.lost_for_good() for one in self._servers):
            reasons = "; ".join(f"{one.url}: {one.trouble or one.server.closed_because}" for one in self._servers)
            return f"no server has the current weights any more: {reasons}"
        return ""

    async def _generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Outcome]:
        await self._pool.released()
        if self._weights.inconsistent_reason:
            raise NoRolloutCapacity(self._weights.inconsistent_reason)
        return await self._pool.generate(requests, sampling)


class Background:
    """An asyncio loop in a thread of its own, so that servers are supervised while the program does something else.

    Ends with `close` or with the program.
    """

    def __init__(self, name: str):
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def run[Result](self, call: Coroutine[Any, Any, Result]) -> Result:
        """Run `call` in the loop and wait for it; an interruption of the waiting thread ends the call too."""
        future = asyncio.run_coroutine_threadsafe(call, self.loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        """Cancel what still runs and end the thread; may be called twice."""
        if self.loop.is_closed():
            return
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()
        left = asyncio.all_tasks(self.loop)
        for task in left:
            task.cancel()
        self.loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
