"""SGLang servers as a rollout engine.

Log-probs: at temperature T they are of log_softmax(logits / T) over the whole vocabulary, before top-p; at T = 1 and
top-p 1 exactly the policy's own. Greedy sampling (T = 0) gives log_softmax(logits). `Sampling.seed` is not used:
SGLang on these backends draws from one generator that all requests of a server share.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from megatron_r1.config.sglang import SGLangConfig
from megatron_r1.errors import ConfigError, NoRolloutCapacity
from megatron_r1.rollout.sample import Outcome, Request, Sampling
from megatron_r1.rollout.sglang.background import Background
from megatron_r1.rollout.sglang.client import BadReply, Client, Endpoint, new_session
from megatron_r1.rollout.sglang.pause import FINISH, Pause
from megatron_r1.rollout.sglang.pool.member import PoolServer
from megatron_r1.rollout.sglang.pool.pool import Pool
from megatron_r1.rollout.sglang.pool.router import Router
from megatron_r1.rollout.sglang.servers import discovery as addresses
from megatron_r1.rollout.sglang.servers.memory import TRAINERS_TURN, EngineMemory
from megatron_r1.rollout.sglang.servers.process import Server, new_endpoints
from megatron_r1.rollout.sglang.servers.startup import ServerFactory
from megatron_r1.rollout.sglang.servers.supervise import CurrentWeights, SupervisedServer, watching
from megatron_r1.rollout.sglang.versions import Versions

CLOSE_SESSION_S = 10.0
UPDATING = "its weights are being replaced"


class SGLangEngine:
    """The servers of a configuration, of one model; a context manager.

    Servers that die or hang are started again. While their weights are in a folder they get them from there; weights
    that came over a process group come again with the next update, until which the server is left out.

    Args:
        model_folder: Hugging Face folder that SGLang can serve (config.json and safetensors; no tokenizer needed).
        config: servers and their limits.
        log_folder: the servers' output goes to ``server-N.log`` in it.
        device: ``cpu`` or ``cuda``.
        dtype: ``float32`` or ``bfloat16``, of weights and activations.
        context_length: longest prompt and response together, in tokens.
        version: weight version that the model in `model_folder` is called.
        pause: what becomes of answers that are under way when weights change.
        first_gpu: of the first server; without effect on a CPU.

    Raises:
        NoRolloutCapacity: a server did not start, ended, or did not answer as it should.
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
    ):
        self.config, self.context_length = config, context_length
        self.tensor_parallel = config.server.tensor_parallel
        self._pause = pause
        if not (Path(model_folder) / "config.json").is_file():
            raise NoRolloutCapacity(f"{model_folder}: no model to serve: the folder has no config.json")
        self._starts = ServerFactory(model_folder, config, log_folder, device, dtype, context_length, first_gpu)
        self.endpoints = addresses.given(config) if config.started_elsewhere else new_endpoints(config.servers)
        """The servers, for senders of weights in this process or another; a server that is restarted keeps its own."""
        self._weights = CurrentWeights(Versions(version), Path(model_folder))
        self._background = Background("sglang-pool")
        self._open: AsyncExitStack | None = None
        self._watched: list[SupervisedServer] = []
        self._front: PoolServer | None = None
        try:
            self._background.run(self._start())
        except BaseException:
            self.close()
            raise

    @property
    def version(self) -> str:
        """Version of the weights that answers come from."""
        return self._weights.version

    @property
    def weights_folder(self) -> Path | None:
        """Folder that holds the servers' current weights; None where only memory does."""
        return self._weights.folder

    @property
    def servers(self) -> list[Server]:
        """The processes that are this program's."""
        return [one.server for one in self._watched if one.server]

    @property
    def restarts(self) -> int:
        """Restarts of servers since the start."""
        return sum(one.restarts for one in self._watched)

    def health(self) -> dict[str, int]:
        """Requests sent, answered, failed and resent, and restarts of servers, all since the start."""
        counts = self._pool.counts
        return {name: counts[name] for name in ("sent", "answered", "failed", "resent")} | {"restarts": self.restarts}

    def states(self) -> list[str]:
        """For each server why it takes no requests; empty where it does."""
        return [one.member.closed_because for one in self._watched]

    @property
    def counts(self) -> dict[str, int]:
        """Calls, and requests by what became of them, since the start."""
        return dict(self._pool.counts)

    @property
    def busy_seconds(self) -> float:
        """Seconds since the start in which a server had something to answer, the mean over servers."""
        members = self._pool.members
        return sum(member.busy.seconds for member in members) / len(members)

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Outcome]:
        """What became of each request, in their order; see the module's docstring for the log-probs.

        Requests with one prompt go to one server when they stand together, so that it reads the prompt once. Several
        threads may ask; servers get first what was asked for first. Nothing is sent while weights are being replaced;
        after an update that failed half way there are no answers until one succeeds.
        """
        for request in requests:
            if (length := len(request.prompt_tokens)) + sampling.max_tokens > self.context_length:
                raise ConfigError(
                    "rollout.max_response_tokens", sampling.max_tokens,
                    f"with the {length} prompt tokens of request {request.id} at most {self.context_length} in all",
                )  # fmt: skip
        if self._open is None:
            raise NoRolloutCapacity("the servers were stopped")
        return self._background.run(self._generate(requests, sampling))

    def abandon(self) -> None:
        """End all calls of `generate` that threads are in: there they raise NoRolloutCapacity."""
        self._background.loop.call_soon_threadsafe(self._pool.abandon)

    def load_weights(self, folder: Path, version: str) -> None:
        """Load the weights of `folder` into all servers at once; each drops its cache and confirms `version`.

        A server that is down gets them when it is back.

        Raises:
            NoRolloutCapacity: a server refused them.
        """
        self._background.run(self._update(Path(folder), version))

    @contextmanager
    def receiving(self, version: str) -> Iterator[None]:
        """The session in which senders send new weights to `endpoints`, in turns.

        At the end of the block every server must say that it serves `version`, so the last sender stamps it. When the
        block or a server fails, some weights may be new and others old: `version` stays what it was and `generate`
        refuses, until another update succeeds. Waits for servers that are being restarted.
        """
        self._background.run(self._begin(version))
        try:
            self._background.run(self._all([client.begin_update() for client in self._clients]))
            yield
            self._background.run(self._finish(version))
        except BaseException as error:
            self._background.run(self._give_up_session())
            if isinstance(error, NoRolloutCapacity):
                self.check()
            raise
        finally:
            self._background.run(self._end())

    @property
    def has_dead_server(self) -> bool:
        """Whether a server has ended and waits for the engine's turn (`take_memory`, `start_missing`)."""
        return self._memory.has_dead_server

    def release_memory(self) -> None:
        """Free the servers' memory for a trainer, when they have answered; until it is taken again they cannot answer.

        A server that fails is ended, so that the memory is free when this returns. What was in it is lost: an update of
        the weights must follow when it is taken.
        """
        self._background.run(self._memory.give_back())

    def resume_memory(self, tags: Sequence[str]) -> None:
        """Take memory again; a server that fails is started again, and then holds all of its own.

        Args:
            tags: `memory.WEIGHTS` before an update of the weights, `memory.CACHE` after it.
        """
        self._background.run(self._memory.take(tags))

    def restart_dead(self) -> None:
        """Start the servers that ended in the trainer's turn; afterwards the memory of all is given back."""
        self._background.run(self._memory.restart_dead())

    def checksums(self) -> dict[str, str]:
        """Checksum of every weight, by SGLang's name.

        Raises:
            NoRolloutCapacity: two servers differ.
        """
        calls = [client.checksums() for client in self._clients]
        first, *others = self._background.run(self._all(calls))
        for client, other in zip(self._clients[1:], others, strict=True):
            if differing := sorted(name for name in first.keys() | other.keys() if first.get(name) != other.get(name)):
                raise NoRolloutCapacity(f"{client.url}: {len(differing)} weights are not the first server's: "
                                        f"{', '.join(differing[:3])}")  # fmt: skip
        return first

    def check(self) -> None:
        """Raise NoRolloutCapacity, with the reason, when a server is down."""
        for one in self._watched:
            if one.trouble:
                raise NoRolloutCapacity(one.trouble)
            if one.server:
                one.server.check()

    def close(self) -> None:
        """Kill all servers with everything that they spawned; may be called twice."""
        if self._open:
            stack, self._open = self._open, None
            self._background.run(stack.aclose())
        self._watched = []
        self._background.close()
        self._starts.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    @property
    def _clients(self) -> list[Client]:
        return [one.member.client for one in self._watched]

    async def _start(self) -> None:
        self._open = AsyncExitStack()
        session = await self._open.enter_async_context(new_session())
        clients = [Client.at(endpoint, self.config.request_timeout_s, session) for endpoint in self.endpoints]
        members = [PoolServer(client, self.config.pool) for client in clients]
        if self.config.router:
            front = Endpoint(self.config.router, self.endpoints[0].api_key, "")
            self._front = PoolServer(Client.at(front, self.config.request_timeout_s, session), self.config.pool, None)
        in_pool = [self._front] if self._front else members
        timeout_s = self.config.request_timeout_s
        self._pool = Pool(in_pool, self.config.pool, timeout_s, self._weights.versions, self._hopeless)
        self._watched = [
            SupervisedServer(member, self.config, self._weights, self._pool.changed, self._launcher(place))
            for place, member in enumerate(members)
        ]
        self._memory = EngineMemory(self._watched, self._pool, self._weights)
        for one in self._watched:
            self._open.push_async_callback(one.stop)
            one.launch()
        await self._all([one.come_up() for one in self._watched])
        await self._all([one.rejoin(first=True) for one in self._watched])
        await self._open.enter_async_context(watching(self._watched))
        if self._front:
            await self._use_router(Router(self.config.router, session))
            self._front.open()

    def _launcher(self, place: int) -> Any:
        if self.config.started_elsewhere:
            return None
        return partial(self._starts.launch, place, self.endpoints[place], self._weights)

    async def _use_router(self, router: Router) -> None:
        """Tell the router of the servers that take requests, now and whenever that changes."""
        assert self._open is not None
        ours = {endpoint.url for endpoint in self.endpoints}

        def wanted() -> dict[str, Endpoint]:
            pairs = zip(self._watched, self.endpoints, strict=True)
            return {endpoint.url: endpoint for one, endpoint in pairs if not one.member.closed_because}

        await router.set_workers(wanted(), ours)
        following = asyncio.ensure_future(router.follow(wanted, ours, self._pool.changed))

        async def leave() -> None:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
            with contextlib.suppress(NoRolloutCapacity):
                await router.set_workers({}, ours)

        self._open.push_async_callback(leave)

    def _hopeless(self) -> str:
        if all(one.memory.given_back and not (one.gone() or one.given_up) for one in self._watched):
            return TRAINERS_TURN
        if all(one.lost_for_good() for one in self._watched):
            told = "; ".join(f"{one.member.name}: {one.trouble or one.member.closed_because}" for one in self._watched)
            return f"no server has the current weights any more: {told}"
        return ""

    async def _generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Outcome]:
        await self._pool.released()
        if self._weights.doubt:
            raise NoRolloutCapacity(self._weights.doubt)
        return await self._pool.generate(requests, sampling)

    async def _update(self, folder: Path, version: str) -> None:
        path, weights = str(folder.resolve()), self._weights
        self._memory.check_weights()
        up: list[SupervisedServer] = []
        async with weights.lock:
            try:
                up = await self._halt()
                if weights.doubt:
                    await self._close_sessions()
                flush = self._pause.flush_cache
                calls = [one.member.client.load_weights(path, version, flush) for one in up]
                results = await asyncio.gather(*calls, return_exceptions=True)
                for one, result in zip(up, results, strict=True):
                    one.member.version = "" if isinstance(result, BaseException) else version
                if any(isinstance(result, BaseException) for result in results):
                    self._evict("its weights may be neither the old ones nor the new ones")
                self._refuse(up, results)
                self._given(version, folder)
            finally:
                await self._release(up)

    def _refuse(self, up: Sequence[SupervisedServer], results: Sequence[Any]) -> None:
        """Raise what a server says against new weights; one that does not answer at all is started again on them."""
        for one, result in zip(up, results, strict=True):
            if not isinstance(result, BaseException):
                continue
            if isinstance(result, BadReply) or not isinstance(result, NoRolloutCapacity) or not one.can_return():
                raise result
            one.distrust(str(result))

    async def _halt(self) -> list[SupervisedServer]:
        """Stop giving out requests, wait for those under way or pause them; returns the servers that answer."""
        for one in self._watched:
            one.updating = True
        self._pool.hold(UPDATING)
        up = [one for one in self._watched if one.up and not one.gone()]
        if self._pause.mode:
            await self._all([one.member.client.pause(self._pause.mode) for one in up])
            for member in self._pool.members:
                member.busy.stop()
        else:
            await self._pool.drained()
        return up

    def _evict(self, reason: str) -> None:
        """Have answers that are under way asked for again, elsewhere or later."""
        for member in self._pool.members:
            member.evict(reason)

    def _given(self, version: str, folder: Path | None) -> None:
        """All servers that answer have these weights."""
        self._weights.versions.give(version)
        self._weights.source, self._weights.doubt = folder, ""

    async def _release(self, up: Sequence[SupervisedServer]) -> None:
        if self._pause.mode:
            await self._resume()
        for one in up:
            if not one.member.version:  # it did not say what it has
                with contextlib.suppress(NoRolloutCapacity):
                    one.member.version = await one.member.client.weight_version()
        for one in self._watched:
            one.updating = False
            one.open_if_current()
        if self._front and not self._weights.doubt:
            self._front.open()
        for member in self._pool.members:
            if member.in_flight:
                member.busy.run()
        self._pool.release()

    async def _begin(self, version: str) -> None:
        self._memory.check_weights()
        await self._all([one.settled() for one in self._watched])
        await self._weights.lock.acquire()
        try:
            await self._halt()
            if self._weights.doubt:
                await self._close_sessions()
            doubt = f"the servers' weights are of no one version: the update to {version!r} was not completed"
            self._weights.doubt = doubt
        except BaseException:
            await self._end()
            raise

    async def _finish(self, version: str) -> None:
        await self._all([client.end_update() for client in self._clients])
        await self._all([client.confirm(version) for client in self._clients])
        for one in self._watched:
            one.member.version = version
        self._given(version, None)

    async def _end(self) -> None:
        await self._release([])
        self._weights.lock.release()

    async def _give_up_session(self) -> None:
        self._evict(self._weights.doubt)
        await self._close_sessions()

    async def _close_sessions(self) -> None:
        """Close sessions that a failed update left open. A server that cannot will say so at the next update."""
        calls = [Client.at(endpoint, CLOSE_SESSION_S).end_update() for endpoint in self.endpoints]
        await asyncio.gather(*calls, return_exceptions=True)

    async def _resume(self) -> None:
        """Let paused servers go on, also after an update that failed: others may wait for their answers."""
        calls = [Client.at(endpoint, CLOSE_SESSION_S).resume() for endpoint in self.endpoints]
        await asyncio.gather(*calls, return_exceptions=True)

    async def _all(self, calls: Sequence[Coroutine[Any, Any, Any]]) -> list[Any]:
        """Run calls at the same time; the first failure ends the others."""
        tasks = [asyncio.ensure_future(call) for call in calls]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
