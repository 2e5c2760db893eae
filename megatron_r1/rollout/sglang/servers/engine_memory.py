"""The memory of all servers of an engine that a trainer shares its devices with.

A server that fails to release or to resume is killed at once, for its memory, and restarted in the engine's phase.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from megatron_r1.errors import NoRolloutCapacity
from megatron_r1.rollout.sglang.pool.pool import Pool
from megatron_r1.rollout.sglang.servers.memory import IN_TRAINER_PHASE, WEIGHTS
from megatron_r1.rollout.sglang.servers.supervise import CurrentWeights, SupervisedServer

logger = logging.getLogger(__name__)


class EngineMemory:
    """All methods run in the pool's loop.

    Args:
        servers: all of this program, so that they can be killed and restarted.
        pool: spreads their requests.
        weights: what they serve; not replaced while memory is released or resumed.
    """

    def __init__(self, servers: Sequence[SupervisedServer], pool: Pool, weights: CurrentWeights):
        self._servers, self._pool, self._weights = servers, pool, weights

    @property
    def has_dead_server(self) -> bool:
        """Whether a server has ended and waits for the engine's phase to be restarted."""
        return any(one.gone() and not one.given_up for one in self._servers)

    def check_weights(self) -> None:
        """
        Raises:
            NoRolloutCapacity: a server holds no memory for its weights, so that they cannot be replaced.
        """
        if any(one.memory.released & set(WEIGHTS) for one in self._servers if not (one.gone() or one.given_up)):
            raise NoRolloutCapacity(IN_TRAINER_PHASE)

    async def release(self) -> None:
        """Release all servers' memory, when their requests have ended; servers that fail are killed.

        Until `resume` no server is started, and until an update of the weights none responds.
        """
        for one in self._servers:
            one.may_start.clear()
        await asyncio.gather(*[self._started(one) for one in self._servers])
        async with self._weights.lock:
            await self._pool.drain(IN_TRAINER_PHASE)
            self._weights.inconsistent_reason = f"{IN_TRAINER_PHASE}; they need an update of the weights"
            await self._each(lambda one: one.memory.release())

    async def resume(self, tags: Sequence[str]) -> None:
        """Have all servers hold this again; those that fail are killed and restarted."""
        async with self._weights.lock:
            await self._each(lambda one: one.memory.resume(tags))
        for one in self._servers:
            one.may_start.set()
            if not self._weights.inconsistent_reason:
                one.open_if_current()
        self._pool.changed.notify()

    async def restart_dead(self) -> None:
        """Restart the servers that have ended, and release their memory too."""
        for one in self._servers:
            one.may_start.set()
        await asyncio.gather(*[one.settled() for one in self._servers], return_exceptions=True)
        await self.release()

    async def _started(self, one: SupervisedServer) -> None:
        """Return when a server that is being started answers, or its process is gone."""
        while not (one.up or one.gone() or one.given_up):
            await asyncio.sleep(0.05)

    async def _each(self, call: Callable[[SupervisedServer], Coroutine[Any, Any, None]]) -> None:
        await asyncio.gather(*[self._or_kill(one, call) for one in self._servers if one.up and not one.gone()])

    async def _or_kill(
        self, one: SupervisedServer, call: Callable[[SupervisedServer], Coroutine[Any, Any, None]]
    ) -> None:
        one.updating = True
        try:
            await call(one)
        except NoRolloutCapacity as error:
            logger.error("killing server %s to free its GPU memory: %s", one.url, error)
            await one.stop()
        finally:
            one.updating = False
