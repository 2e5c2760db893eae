"""Updates the weights of all servers at once: generation is held, every server gets the weights, generation resumes.

Weights come from a folder (`load`), or from senders (`receiving`). When an update fails half way, some weights may be
new and others old: no server generates until another one succeeds.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from megatron_r1.errors import NoRolloutCapacity
from megatron_r1.rollout.sglang.client import Client, Endpoint, run_all
from megatron_r1.rollout.sglang.pause import Pause
from megatron_r1.rollout.sglang.pool.pool import Pool
from megatron_r1.rollout.sglang.pool.server import PoolServer
from megatron_r1.rollout.sglang.replies import BadReply
from megatron_r1.rollout.sglang.servers.engine_memory import EngineMemory
from megatron_r1.rollout.sglang.servers.supervise import CurrentWeights, SupervisedServer

CLOSE_SESSION_S = 10.0
UPDATING = "its weights are being updated"


class WeightSession:
    """All methods run in the pool's loop.

    Args:
        servers: that get the weights.
        endpoints: of the servers.
        pool: holds requests meanwhile.
        router: in the pool, where one stands before the servers.
        memory: refuses an update while servers hold no memory for weights.
        weights: the record of what the servers have.
        pause: what happens to responses in flight.
    """

    def __init__(
        self,
        servers: Sequence[SupervisedServer],
        endpoints: Sequence[Endpoint],
        pool: Pool,
        router: PoolServer | None,
        memory: EngineMemory,
        weights: CurrentWeights,
        pause: Pause,
    ):
        self._servers, self._endpoints, self._pool, self._router = servers, endpoints, pool, router
        self._memory, self._weights, self.pause = memory, weights, pause

    async def load(self, folder: Path, version: str) -> None:
        """Have all servers load a folder; one that is down loads it when it is back.

        Raises:
            NoRolloutCapacity: a server refused the weights.
        """
        path, weights = str(folder.resolve()), self._weights
        self._memory.check_weights()
        async with weights.lock, self._holding() as up:
            if weights.inconsistent_reason:
                await self._close_sessions()
            flush = self.pause.flush_cache
            calls = [one.server.client.load_weights(path, version, flush) for one in up]
            results = await asyncio.gather(*calls, return_exceptions=True)
            for one, result in zip(up, results, strict=True):
                one.server.version = "" if isinstance(result, BaseException) else version
            if any(isinstance(result, BaseException) for result in results):
                self._evict("its weights may be neither the old ones nor the new ones")
            for one, result in zip(up, results, strict=True):
                if isinstance(result, BaseException):
                    # What a server says against the weights is raised; one that is silent is restarted on them.
                    refused = isinstance(result, BadReply) or not isinstance(result, NoRolloutCapacity)
                    if refused or not one.can_return():
                        raise result
                    one.mark_unknown(str(result))
            self._record(version, folder)

    @asynccontextmanager
    async def receiving(self, version: str) -> AsyncIterator[None]:
        """Inside the block the servers accept buckets; at its end every one must report `version`.

        Waits for servers that are restarting. After a failure the requests in flight are given back.
        """
        weights, clients = self._weights, [one.server.client for one in self._servers]
        self._memory.check_weights()
        await run_all([one.settled() for one in self._servers])
        async with weights.lock, self._holding():
            if weights.inconsistent_reason:
                await self._close_sessions()
            reason = f"the servers' weights are of no one version: the update to {version!r} was not completed"
            weights.inconsistent_reason = reason
            try:
                await run_all([client.begin_update() for client in clients])
                yield
                await run_all([client.end_update() for client in clients])
                await run_all([client.confirm(version) for client in clients])
            except BaseException as error:
                self._evict(reason)
                await self._close_sessions()
                if isinstance(error, NoRolloutCapacity):
                    await run_all([one.check_after_failure() for one in self._servers])
                raise
            for one in self._servers:
                one.server.version = version
            self._record(version, None)

    @asynccontextmanager
    async def _holding(self) -> AsyncIterator[list[SupervisedServer]]:
        """Inside the block no requests are sent; those in flight have ended, or their servers are paused.

        Gives the servers that answer. At the end generation resumes where the weights allow it, after a failure too:
        callers may wait for responses of paused servers.
        """
        with self._pool.hold(UPDATING):
            for one in self._servers:
                one.updating = True
            up = [one for one in self._servers if one.up and not one.gone()]
            try:
                if self.pause.mode:
                    await run_all([one.server.client.pause(self.pause.mode) for one in up])
                    for server in self._pool.servers:
                        server.busy.stop()
                else:
                    await self._pool.drained()
                yield up
            finally:
                if self.pause.mode:
                    calls = [Client.at(endpoint, CLOSE_SESSION_S).resume() for endpoint in self._endpoints]
                    await asyncio.gather(*calls, return_exceptions=True)
                for one in up:
                    if not one.server.version:  # it did not say which weights it has
                        with contextlib.suppress(NoRolloutCapacity):
                            one.server.version = await one.server.client.weight_version()
                for one in self._servers:
                    one.updating = False
                    one.open_if_current()
                if self._router and not self._weights.inconsistent_reason:
                    self._router.open()
                for server in self._pool.servers:
                    if server.in_flight:
                        server.busy.run()

    def _record(self, version: str, folder: Path | None) -> None:
        """All servers that answer have these weights."""
        self._weights.versions.append(version)
        self._weights.source, self._weights.inconsistent_reason = folder, ""

    def _evict(self, reason: str) -> None:
        """Have responses in flight requested again, from other servers or later."""
        for server in self._pool.servers:
            server.evict(reason)

    async def _close_sessions(self) -> None:
        """Close sessions that a failed update left open. A server that cannot will say so at the next update."""
        calls = [Client.at(endpoint, CLOSE_SESSION_S).end_update() for endpoint in self._endpoints]
        await asyncio.gather(*calls, return_exceptions=True)
