"""Many servers as one: each request is answered once, by whichever server can, or counted as failed.

Requests of one prompt travel together, to the server that prefers their prompt, unless it has more requests in flight
than the others. Preference is by rendezvous hashing (Thaler and Ravishankar, 1998): without a table, a prompt keeps
its server while the set of servers changes around it. The bound on load is that of consistent hashing with bounded
loads (Mirrokni, Thorup and Zadimoghaddam, 2018) at its tightest: no server above the mean gets more. A call that
fails, or a reply that is not what was requested, is a failure of that server: its requests go to another server, after
a backoff, as far as the retry budget allows (retries.py), until `give_up_s` is spent.

Several threads may call `generate`: servers get the requests in the order of the calls.

Why there is a pool beside the router: an sglang-router (router.py) in front of the servers balances load by its cache
and scales to many servers, so it can stand in the place of the servers. But it hands any reply of status 200 on, and
it does not know weight versions. The pool validates every reply, gives each request a deadline and an outcome, holds
requests while weights are updated, and sends nothing to a server on old weights; it does so whether one router or many
servers are behind it.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from hashlib import blake2b
from itertools import groupby
from typing import Protocol

from megatron_r1.config.sglang import PoolConfig
from megatron_r1.errors import NoRolloutCapacity
from megatron_r1.rollout.engine import FailedRequest, Outcome, Request, Sampling
from megatron_r1.rollout.sglang.pool.retries import RetryBudget, StateChanged, backoff_s
from megatron_r1.rollout.sglang.pool.server import Evicted, PoolServer, current_task_is_cancelled
from megatron_r1.rollout.sglang.replies import BadReply, Refused

HELD_POLL_S = 60.0
REFUSALS = 3
"""Refusals by servers after which a request has failed."""


class InFlightLimit:
    """At most so many requests are in flight; calls get their share in order, however many requests they have."""

    def __init__(self, count: int):
        self._count, self._free = count, asyncio.Semaphore(count)
        self._in_order = asyncio.Lock()

    @asynccontextmanager
    async def reserve(self, requests: int) -> AsyncIterator[None]:
        """Wait for, and hold, places for so many requests; more than there are take all."""
        wanted, held = min(requests, self._count), 0
        try:
            async with self._in_order:
                for _ in range(wanted):
                    await self._free.acquire()
                    held += 1
            yield
        finally:
            for _ in range(held):
                self._free.release()


class Pool:
    """Spreads requests over servers. All methods run in one loop.

    Args:
        servers: the servers, or a router in their place.
        config: limits, retries and deadlines.
        request_timeout_s: seconds that one call may take.
        versions: of the weights, all so far; the list grows. Completions come from the one that is the last when they
            are requested, or from newer ones.
        hopeless: says why no server will ever be there again; empty as long as one may.
    """

    def __init__(
        self,
        servers: Sequence[PoolServer],
        config: PoolConfig,
        request_timeout_s: float,
        versions: list[str],
        hopeless: Callable[[], str] = str,
    ):
        self.servers, self.config, self.request_timeout_s = list(servers), config, request_timeout_s
        self._versions, self._hopeless = versions, hopeless
        self.held = False
        """Requests wait, however long, since servers are about to get new weights."""
        self.changed = StateChanged()
        """Notified when a server opens or closes."""
        self.counts: Counter[str] = Counter()
        """Calls; and requests that were sent, answered, failed and resent."""
        self._budget = RetryBudget(config.retry_share, config.retry_floor_per_s * len(self.servers))
        self._none_since: float | None = None
        self._limit = InFlightLimit(config.in_flight_per_server * len(self.servers))
        self._tasks: set[asyncio.Task[list[Outcome]]] = set()

    async def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Outcome]:
        """The outcome of each request, in order.

        Raises:
            NoRolloutCapacity: there was no server for `capacity_timeout_s`, or there will not be one; or `abandon`.
        """
        if not self._tasks:
            self._none_since = None

        async def serve(call: list[Request]) -> list[Outcome]:
            async with self._limit.reserve(len(call)):
                return await _Call(self, call, sampling, self._versions).outcomes()

        calls = split_into_calls(requests, self.config.requests_per_call)
        tasks = [asyncio.ensure_future(serve(call)) for call in calls]
        self._tasks.update(tasks)
        try:
            return [outcome for outcomes in await asyncio.gather(*tasks) for outcome in outcomes]
        except asyncio.CancelledError:
            if current_task_is_cancelled():
                raise
            raise NoRolloutCapacity("the requests were abandoned") from None
        finally:
            for task in tasks:
                task.cancel()
            self._tasks.difference_update(tasks)

    def abandon(self) -> None:
        """End all calls of `generate`."""
        for task in self._tasks:
            task.cancel()

    @contextmanager
    def hold(self, reason: str) -> Iterator[None]:
        """Have requests wait inside the block, however long; those in flight may end."""
        self.held = True
        self._close(reason)
        try:
            yield
        finally:
            self.held = False
            self.changed.notify()

    async def drain(self, reason: str) -> None:
        """Send no more requests, and return when those in flight have ended."""
        self._close(reason)
        await self.drained()

    async def drained(self) -> None:
        """Return when the requests in flight have ended."""
        await asyncio.gather(*[server.idle() for server in self.servers])

    async def released(self) -> None:
        """Return when no update of the weights holds requests back."""
        while self.held:
            await self.changed.wait(HELD_POLL_S)

    async def acquire(self, key: bytes, avoid: set[PoolServer]) -> PoolServer:
        """The server for a prompt, one outside `avoid` if possible; waits for one.

        Raises:
            NoRolloutCapacity: see `generate`.
        """
        while True:
            if self.held:
                await self.released()
                self._none_since = None
            version = self._versions[-1]
            ready = [server for server in self.servers if server.ready(version)]
            now = time.monotonic()
            if any(server.breaker.closed for server in ready):
                self._none_since = None
            elif self._none_since is None:
                self._none_since = now
            if ready:
                return choose([server for server in ready if server not in avoid] or ready, key)
            if reason := self._hopeless():
                raise NoRolloutCapacity(reason)
            left = (self._none_since or now) + self.config.capacity_timeout_s - now
            if left <= 0:
                raise NoRolloutCapacity(f"no server for {self.config.capacity_timeout_s:g} s: {self._reasons()}")
            await self.changed.wait(min([left, *self._tries_in(version)]) + 0.001)

    def _close(self, reason: str) -> None:
        for server in self.servers:
            if not server.closed_because:
                server.close(reason)

    def take_budget(self, requests: int) -> float:
        """Seconds to wait until so many requests may be sent again."""
        self.counts["resent"] += requests
        return self._budget.wait_s(requests)

    def sent_first(self, requests: int) -> None:
        self.counts["sent"] += requests
        self._budget.sent_first(requests)

    def _tries_in(self, version: str) -> list[float]:
        """Seconds until servers whose breakers are open may be tried."""
        return [
            server.breaker.opens_in for server in self.servers if server.serves(version) and server.breaker.opens_in
        ]

    def _reasons(self) -> str:
        return "; ".join(f"{server.name}: {server.closed_because or 'its calls fail'}" for server in self.servers)


class VersionsFromNowOn:
    """The weight versions that a completion may have: the last one of a list when this is made, and all added later.

    A response that is generated while weights change has several.
    """

    def __init__(self, versions: list[str]):
        self._versions, self._start = versions, len(versions) - 1

    def __contains__(self, version: object) -> bool:
        return version in self._versions[self._start :]

    def __str__(self) -> str:
        return repr(self._versions[self._start])


class _Call:
    """The requests of one call, until each has an outcome."""

    def __init__(self, pool: Pool, requests: list[Request], sampling: Sampling, versions: list[str]):
        self._pool, self._requests, self._sampling, self._versions = pool, requests, sampling, versions
        self._key = key_of(requests[0].prompt_tokens)
        self._waiting = dict(enumerate(requests))
        self._outcomes: dict[int, Outcome] = {}
        self._spent, self._refused, self._reason = 0.0, 0, ""
        self._avoid: set[PoolServer] = set()

    async def outcomes(self) -> list[Outcome]:
        self._pool.sent_first(len(self._requests))
        attempt = 0
        while self._waiting:
            server = await self._pool.acquire(self._key, self._avoid)
            free = await self._try(server)
            if not self._waiting:
                break
            attempt += 1
            await self._pause(backoff_s(attempt))
            # A server that is gone has not done the work: sending it to another one is no additional load.
            if not (free or server.gone()):
                await self._pause(self._pool.take_budget(len(self._waiting)))
            if self._spent >= self._pool.config.give_up_s or self._refused >= REFUSALS:
                self._give_up()
        return [self._outcomes[index] for index in range(len(self._requests))]

    async def _pause(self, seconds: float) -> None:
        """Wait, but not beyond the time at which the requests fail."""
        self._spent += seconds
        await asyncio.sleep(max(0.0, min(seconds, seconds + self._pool.config.give_up_s - self._spent)))

    async def _try(self, server: PoolServer) -> bool:
        """Send what is missing to a server; whether what is then still missing may be resent outside the budget."""
        pool, indices = self._pool, list(self._waiting)
        left = min(pool.request_timeout_s, pool.config.give_up_s - self._spent)
        versions = VersionsFromNowOn(self._versions)
        started, is_trial, free = time.monotonic(), server.breaker.start(), False
        pool.counts["calls"] += 1
        requests = [self._waiting[index] for index in indices]
        try:
            call = server.client.generate(requests, self._sampling, versions, left)
            for index, reply in zip(indices, await server.call(call, len(requests)), strict=True):
                if isinstance(reply, BadReply):
                    self._reason = str(reply)
                else:
                    self._outcomes[index] = reply
                    del self._waiting[index]
                    pool.counts["answered"] += 1
        except Evicted as error:
            self._reason, free = str(error), True
        except NoRolloutCapacity as error:
            self._reason = str(error)
            self._refused += isinstance(error, Refused)
        except BaseException:
            server.breaker.release(is_trial)
            raise
        self._spent += time.monotonic() - started
        server.answered += len(indices) - len(self._waiting)
        self._avoid = {server} if self._waiting else set()
        if len(self._waiting) < len(indices):
            server.breaker.succeed()
        elif free:
            server.breaker.release(is_trial)
        else:
            server.breaker.fail(is_trial)
        if is_trial:
            pool.changed.notify()
        return free

    def _give_up(self) -> None:
        self._pool.counts["failed"] += len(self._waiting)
        for index, request in self._waiting.items():
            self._outcomes[index] = FailedRequest(request.id, self._reason)
        self._waiting = {}


class Loaded(Protocol):
    """What can be chosen."""

    @property
    def name(self) -> str: ...

    @property
    def in_flight(self) -> int: ...


def key_of(prompt_tokens: Iterable[int]) -> bytes:
    """The key of a prompt in `choose`."""
    return blake2b(",".join(map(str, prompt_tokens)).encode(), digest_size=16).digest()


def preference(key: bytes, name: str) -> bytes:
    """How much a prompt prefers a server; larger is more."""
    return blake2b(name.encode(), digest_size=8, key=key).digest()


def choose[Server: Loaded](servers: Sequence[Server], key: bytes) -> Server:
    """The most preferred server whose load is not above the mean."""
    mean = sum(server.in_flight for server in servers) / len(servers)
    open_to_more = [server for server in servers if server.in_flight <= mean]
    return max(open_to_more, key=lambda server: preference(key, server.name))


def split_into_calls(requests: Sequence[Request], largest: int) -> Iterator[list[Request]]:
    """Requests of each call, in order: neighbours with the same prompt stay together.

    Groups that fit are put together up to `largest` requests; a group that alone is larger is cut.
    """
    call: list[Request] = []
    for _, run in groupby(requests, key=lambda request: request.prompt_tokens):
        group = list(run)
        if call and len(call) + len(group) > largest:
            yield call
            call = []
        while len(group) > largest:
            yield group[:largest]
            group = group[largest:]
        call += group
    if call:
        yield call
