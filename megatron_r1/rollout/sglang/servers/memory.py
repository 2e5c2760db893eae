"""Servers that take turns with a trainer on the same devices: their memory is given back and taken again.

SGLang 0.5.23 gives memory back by tags. A server dies when it is told so while a request runs, and when it is told to
take what it has not given back; so what each process holds is written down here, and there is no other way to those
calls. When a call fails nobody knows what the process holds: it is ended at once, and started again when it is the
engine's turn. A new process holds all of its memory.

A server frees memory only where it was started with `rollout.sglang.server.memory_saver`, which needs CUDA; without
it the calls are answered just the same.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any

from megatron_r1.errors import NoRolloutCapacity
from megatron_r1.rollout.sglang.client import BadReply, Client

if TYPE_CHECKING:
    from megatron_r1.rollout.sglang.pool.pool import Pool
    from megatron_r1.rollout.sglang.servers.supervise import CurrentWeights, SupervisedServer

logger = logging.getLogger(__name__)

WEIGHTS = ("weights",)
CACHE = ("kv_cache", "cuda_graph")
"""What answers need beside the weights."""
EVERYTHING = (*WEIGHTS, *CACHE)
IDLE_S = 10.0
"""Seconds that a server may take to end what it was told to end."""
TRAINERS_TURN = "it is the trainer's turn: the servers have given back their memory"


class ServerMemory:
    """What one server's process holds of its memory.

    Attributes:
        given_back: tags of what it does not hold.
    """

    def __init__(self, client: Client):
        self._client = client
        self.given_back: frozenset[str] = frozenset()
        self._doubt = ""

    def renewed(self) -> None:
        """The process is a new one, which holds everything."""
        self.given_back, self._doubt = frozenset(), ""

    async def give_back(self) -> None:
        """Free everything that is held; what the server still generates is ended.

        Raises:
            NoRolloutCapacity: the server failed; what it holds is not known, and it must be started again.
        """
        if held := [tag for tag in EVERYTHING if tag not in self.given_back]:
            await self._change(self._become_idle)
            await self._change(lambda: self._client.release_memory(held))
            self.given_back = frozenset(EVERYTHING)

    async def take(self, tags: Sequence[str]) -> None:
        """Hold this again, as far as it was given back. What is in it is arbitrary.

        Raises:
            NoRolloutCapacity: as of `give_back`.
        """
        if missing := [tag for tag in tags if tag in self.given_back]:
            await self._change(lambda: self._client.resume_memory(missing))
            self.given_back -= set(missing)

    async def _change(self, call: Callable[[], Coroutine[Any, Any, None]]) -> None:
        if self._doubt:
            raise NoRolloutCapacity(f"nobody knows what memory the server holds: {self._doubt}")
        try:
            await call()
        except BaseException as error:
            self._doubt = str(error) or type(error).__name__
            raise

    async def _become_idle(self) -> None:
        """Return when the server itself says that no request runs: calls that were given up may still."""
        try:
            await self._client.flush(0.0)
        except BadReply:
            await self._client.stop_all()
            await self._client.flush(IDLE_S)


class EngineMemory:
    """The memory of all servers of an engine. All methods run in the pool's loop.

    Args:
        servers: all of this program, so that they can be ended and started again.
        pool: gives out their requests.
        weights: what they serve; not replaced while memory changes hands.
    """

    def __init__(self, servers: Sequence[SupervisedServer], pool: Pool, weights: CurrentWeights):
        self._servers, self._pool, self._weights = servers, pool, weights

    @property
    def has_dead_server(self) -> bool:
        """Whether a server waits for the engine's turn to be started again."""
        return any(one.gone() and not one.given_up for one in self._servers)

    def check_weights(self) -> None:
        """
        Raises:
            NoRolloutCapacity: a server has no memory for its weights, so that they cannot be replaced.
        """
        if any(one.memory.given_back & set(WEIGHTS) for one in self._servers if not (one.gone() or one.given_up)):
            raise NoRolloutCapacity(TRAINERS_TURN)

    async def give_back(self) -> None:
        """Free all servers' memory, when their requests have ended; servers that fail are ended.

        Until `take` no server is started, and until an update of the weights none answers.
        """
        for one in self._servers:
            one.turn.clear()
        await asyncio.gather(*[self._begun(one) for one in self._servers])
        async with self._weights.lock:
            await self._pool.drain(TRAINERS_TURN)
            self._weights.doubt = f"{TRAINERS_TURN}; they need an update of the weights"
            await self._each(lambda one: one.memory.give_back())

    async def take(self, tags: Sequence[str]) -> None:
        """Have all servers hold this again; those that fail are ended and started again."""
        async with self._weights.lock:
            await self._each(lambda one: one.memory.take(tags))
        for one in self._servers:
            one.turn.set()
            if not self._weights.doubt:
                one.open_if_current()
        self._pool.changed.notify()

    async def restart_dead(self) -> None:
        """Start the servers that wait for it, and free their memory too."""
        for one in self._servers:
            one.turn.set()
        await asyncio.gather(*[one.settled() for one in self._servers], return_exceptions=True)
        await self.give_back()

    async def _begun(self, one: SupervisedServer) -> None:
        """Return when a server that is being started answers, or its process is gone."""
        while not (one.up or one.gone() or one.given_up):
            await asyncio.sleep(0.05)

    async def _each(self, call: Callable[[SupervisedServer], Coroutine[Any, Any, None]]) -> None:
        await asyncio.gather(*[self._or_end(one, call) for one in self._servers if one.up and not one.gone()])

    async def _or_end(
        self, one: SupervisedServer, call: Callable[[SupervisedServer], Coroutine[Any, Any, None]]
    ) -> None:
        one.updating = True
        try:
            await call(one)
        except NoRolloutCapacity as error:
            logger.error("%s: %s; it is ended, for its memory", one.member.name, error)
            await one.stop()
        finally:
            one.updating = False
