"""Updates the weights of all servers at once: generation is held, every server gets the weights, generation resumes.

Weights come from a folder (`load`), or from senders in a session: `begin`, `open_servers`, the senders send, `confirm`;
`abort` after a failure, and `end` in any case. When a session fails, some weights may be new and others old: no server
generates until another update succeeds.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from pathlib import Path

from megatron_r1.errors import NoRolloutCapacity
from megatron_r1.rollout.sglang.background import run_all
from megatron_r1.rollout.sglang.client import Client, Endpoint
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
        up: list[SupervisedServer] = []
        async with weights.lock:
            try:
                up = await self._hold()
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
            finally:
                await self._resume(up)

    async def begin(self, version: str) -> None:
        """Wait for servers that are restarting, and hold generation.

        The lock is acquired here and released in `end`, not by a `with` statement: between the two the trainer's
        thread sends weights, and this loop serves health checks and replies meanwhile.
        """
        self._memory.check_weights()
        await run_all([one.settled() for one in self._servers])
        await self._weights.lock.acquire()
        try:
            await self._hold()
            if self._weights.inconsistent_reason:
                await self._close_sessions()
            reason = f"the servers' weights are of no one version: the update to {version!r} was not completed"
            self._weights.inconsistent_reason = reason
        except BaseException:
            await self.end()
            raise

    async def open_servers(self) -> None:
        """Have all servers accept buckets."""
        await run_all([one.server.client.begin_update() for one in self._servers])

    async def confirm(self, version: str) -> None:
        """Close the servers' sessions; every server must report `version`."""
        clients = [one.server.client for one in self._servers]
        await run_all([client.end_update() for client in clients])
        await run_all([client.confirm(version) for client in clients])
        for one in self._servers:
            one.server.version = version
        self._record(version, None)

    async def abort(self) -> None:
        """Close the servers' sessions after a failure, and give back the requests in flight."""
        self._evict(self._weights.inconsistent_reason)
        await self._close_sessions()

    async def end(self) -> None:
        """Resume generation, where the weights allow it."""
        await self._resume([])
        self._weights.lock.release()

    async def _hold(self) -> list[SupervisedServer]:
        """Send no requests; wait for those in flight, or pause the servers. Returns the servers that answer."""
        for one in self._servers:
            one.updating = True
        self._pool.hold(UPDATING)
        up = [one for one in self._servers if one.up and not one.gone()]
        if self.pause.mode:
            await run_all([one.server.client.pause(self.pause.mode) for one in up])
            for server in self._pool.servers:
                server.busy.stop()
        else:
            await self._pool.drained()
        return up

    async def _resume(self, updated: Sequence[SupervisedServer]) -> None:
        """Undo `_hold`, also after an update that failed: callers may wait for responses of paused servers."""
        if self.pause.mode:
            calls = [Client.at(endpoint, CLOSE_SESSION_S).resume() for endpoint in self._endpoints]
            await asyncio.gather(*calls, return_exceptions=True)
        for one in updated:
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
        self._pool.release()

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
