"""A server as the pool sees it: whether it takes requests, how many it has in flight, and how it has done so far.

A server whose calls fail is left alone for a while by its circuit breaker.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

from megatron_r1.config.sglang import PoolConfig
from megatron_r1.errors import NoRolloutCapacity
from megatron_r1.rollout.sglang.client import Client

LONGEST_COOLDOWN = 32
"""Most that repeated failures lengthen a breaker's cooldown, as a factor."""


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


class Breaker:
    """A circuit breaker (Nygard, Release It!, chapter 5): closed, open, and half open for one trial call.

    Args:
        failures: failures in a row that open it.
        cooldown_s: seconds that it stays open; doubled by every trial that fails.
        clock: monotonic seconds.
    """

    def __init__(self, failures: int, cooldown_s: float, clock: Callable[[], float] = time.monotonic):
        self._limit, self._cooldown, self._clock = failures, cooldown_s, clock
        self._failed, self._factor = 0, 1
        self._closed_again_at: float | None = None
        self._trying = False

    @property
    def closed(self) -> bool:
        return self._closed_again_at is None

    @property
    def opens_in(self) -> float:
        """Seconds until a trial call may go out; 0 where one may already, or is out."""
        return 0.0 if self._closed_again_at is None else max(0.0, self._closed_again_at - self._clock())

    def allows(self) -> bool:
        """Whether a call may go out."""
        return self.closed or (self.opens_in == 0.0 and not self._trying)

    def start(self) -> bool:
        """A call goes out; whether it is the trial of a half-open breaker."""
        self._trying = self._trying or not self.closed
        return not self.closed

    def succeed(self) -> None:
        """A call succeeded."""
        self._failed, self._factor, self._closed_again_at, self._trying = 0, 1, None, False

    def fail(self, tried: bool = False) -> None:
        """A call failed.

        Args:
            tried: it was the trial; calls that were in flight when the breaker opened change nothing.
        """
        if self.closed:
            self._failed += 1
            if self._failed < self._limit:
                return
        elif not tried:
            return
        else:
            self._factor = min(2 * self._factor, LONGEST_COOLDOWN)
        self._trying = False
        self._closed_again_at = self._clock() + self._cooldown * self._factor

    def release(self, tried: bool) -> None:
        """A call ended and says nothing about the server."""
        self._trying = self._trying and not tried


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
