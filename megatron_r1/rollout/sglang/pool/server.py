"""A server as the pool sees it: whether it takes requests, how many it has in flight, and how it has done so far."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

from megatron_r1.config.sglang import PoolConfig
from megatron_r1.errors import NoRolloutCapacity
from megatron_r1.rollout.sglang.client import Client
from megatron_r1.rollout.sglang.pool.breaker import Breaker


class Evicted(NoRolloutCapacity):
    """This side ended a call, because its server is given up or restarted."""


class PoolServer:
    """One server of a pool.

    Args:
        client: calls it.
        config: of the pool.
        version: version of the weights that it is known to have; None for a router, which has none of its own.
        gone: whether its process has ended, as far as this process can see.
    """

    def __init__(
        self, client: Client, config: PoolConfig, version: str | None = "", gone: Callable[[], bool] = lambda: False
    ):
        self.client, self.version, self.gone = client, version, gone
        self.breaker = Breaker(config.breaker_failures, config.breaker_cooldown_s)
        self.closed_because = "it has not started yet"
        """Why it takes no requests; empty where it does."""
        self.in_flight = 0
        """Requests that it was sent and has not answered."""
        self.answered = 0
        """Requests that it answered with a usable reply, since it was opened."""
        self.busy = Stopwatch()
        """Time during which it had requests in flight."""
        self._calls: set[asyncio.Task[Any]] = set()

    @property
    def name(self) -> str:
        return self.client.url

    def ready(self, version: str) -> bool:
        """Whether it can be sent a request that is to be answered with these weights."""
        return self.serves(version) and self.breaker.allows()

    def serves(self, version: str) -> bool:
        """The same, whatever its breaker says."""
        return not self.closed_because and self.version in (None, version) and not self.gone()

    def open(self) -> None:
        """Take requests from now on."""
        self.closed_because, self.answered = "", 0
        self.breaker.succeed()

    def close(self, reason: str) -> None:
        """Take no more requests; those in flight may end (draining)."""
        self.closed_because = reason

    def evict(self, reason: str) -> None:
        """Take no more requests, and give back those in flight."""
        self.close(reason)
        for call in list(self._calls):
            call.cancel(reason)

    async def call[Result](self, call: Coroutine[Any, Any, Result], requests: int) -> Result:
        """Run a call to this server that answers so many requests.

        Raises:
            Evicted: the server was evicted meanwhile.
        """
        task = asyncio.ensure_future(call)
        self._calls.add(task)
        with self._counted(requests):
            try:
                return await task
            except asyncio.CancelledError:
                if task.cancelled() and self.closed_because and not current_task_is_cancelled():
                    raise Evicted(f"{self.name}: {self.closed_because}") from None
                raise
            finally:
                self._calls.discard(task)

    async def idle(self) -> None:
        """Return when the calls in flight have ended."""
        while self._calls:
            await asyncio.wait(set(self._calls))

    @contextmanager
    def _counted(self, requests: int) -> Iterator[None]:
        self.in_flight += requests
        self.busy.run()
        try:
            yield
        finally:
            self.in_flight -= requests
            if not self.in_flight:
                self.busy.stop()


class Stopwatch:
    """Adds up the time between `run` and `stop`."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock, self._total = clock, 0.0
        self._since: float | None = None

    @property
    def seconds(self) -> float:
        return self._total + (0.0 if self._since is None else self._clock() - self._since)

    def run(self) -> None:
        """No effect where it runs already."""
        if self._since is None:
            self._since = self._clock()

    def stop(self) -> None:
        """No effect where it is stopped already."""
        self._total, self._since = self.seconds, None


def current_task_is_cancelled() -> bool:
    """Whether the running task itself was cancelled, rather than what it waits for."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
