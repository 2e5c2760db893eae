"""Many servers as one: each request is answered once, by whichever server can, or counted as lost.

Requests of one prompt travel together, to the server that prefers their prompt (routing.py). A call that fails, or an
answer that is not what was asked for, is a failure of that server: the requests concerned go to another one, after a
pause that grows, as far as the retry budget allows (breaker.py), until `give_up_s` is spent.

Several callers may ask at a time: servers get the requests in the order in which they were asked for.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from megatron_r1.config.sglang import PoolConfig
from megatron_r1.errors import NoRolloutCapacity
from megatron_r1.rollout.sample import Completion, FailedRequest, Outcome, Request, Sampling
from megatron_r1.rollout.sglang.client import BadReply, Refused
from megatron_r1.rollout.sglang.pool.breaker import RetryBudget, StateChanged, backoff_s
from megatron_r1.rollout.sglang.pool.load_balancing import choose, key_of, pieces
from megatron_r1.rollout.sglang.pool.member import Evicted, PoolServer, current_task_is_cancelled
from megatron_r1.rollout.sglang.pool.slots import InFlightLimit
from megatron_r1.rollout.sglang.versions import Versions

HELD_LOOK_S = 60.0
REFUSALS = 3
"""Servers may refuse a request so many times before it is lost."""


class Pool:
    """Spreads requests over its members. All methods run in one loop.

    Args:
        members: the servers, or a router in their place.
        config: how.
        request_timeout_s: seconds that one call may take.
        versions: of the weights; answers come from those that are current when they are asked for, or newer ones.
        hopeless: says why no server will ever be there again; empty as long as one may.
    """

    def __init__(
        self,
        members: Sequence[PoolServer],
        config: PoolConfig,
        request_timeout_s: float,
        versions: Versions,
        hopeless: Callable[[], str] = str,
    ):
        self.members, self.config, self.request_timeout_s = list(members), config, request_timeout_s
        self._versions, self._hopeless = versions, hopeless
        self.held = False
        """Requests wait, however long, since servers are about to be given new weights."""
        self.changed = StateChanged()
        """To be told when a member opens or closes."""
        self.counts: Counter[str] = Counter()
        """Calls, and requests by what became of them: sent, answered, failed, resent."""
        self._budget = RetryBudget(config.retry_share, config.retry_floor_per_s * len(self.members))
        self._none_since: float | None = None
        self._slots = InFlightLimit(config.in_flight_per_server * len(self.members))
        self._asking: set[asyncio.Task[Any]] = set()

    async def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Outcome]:
        """What became of each request, in their order.

        Raises:
            NoRolloutCapacity: there was no server for `capacity_timeout_s`, or there will not be one; or `abandon`.
        """
        if not self._asking:
            self._none_since = None

        async def serve(piece: list[Request]) -> list[Outcome]:
            async with self._slots.taken(len(piece)):
                return await _Piece(self, piece, sampling, self._versions).outcomes()

        tasks = [asyncio.ensure_future(serve(piece)) for piece in pieces(requests, self.config.requests_per_call)]
        self._asking.update(tasks)
        try:
            return [outcome for outcomes in await asyncio.gather(*tasks) for outcome in outcomes]
        except asyncio.CancelledError:
            if current_task_is_cancelled():
                raise
            raise NoRolloutCapacity("the requests were abandoned") from None
        finally:
            for task in tasks:
                task.cancel()
            self._asking.difference_update(tasks)

    def abandon(self) -> None:
        """End all calls of `generate`."""
        for task in self._asking:
            task.cancel()

    def hold(self, reason: str) -> None:
        """Have requests wait, however long; those under way may end."""
        self.held = True
        self._close(reason)

    async def drain(self, reason: str) -> None:
        """Give no member any more requests, and return when those under way have ended."""
        self._close(reason)
        await self.drained()

    async def drained(self) -> None:
        """Return when the requests under way have ended."""
        await asyncio.gather(*[member.idle() for member in self.members])

    async def released(self) -> None:
        """Return when no new weights are waited for."""
        while self.held:
            await self.changed.wait(HELD_LOOK_S)

    def release(self) -> None:
        """Requests need not wait for new weights any more."""
        self.held = False
        self.changed.notify()

    async def acquire(self, key: bytes, avoid: set[PoolServer]) -> PoolServer:
        """The member for a prompt, rather none of `avoid`; waits for one.

        Raises:
            NoRolloutCapacity: see `generate`.
        """
        while True:
            if self.held:
                await self.released()
                self._none_since = None
            version = self._versions.current
            ready = [member for member in self.members if member.ready(version)]
            now = time.monotonic()
            if any(member.breaker.closed for member in ready):
                self._none_since = None
            elif self._none_since is None:
                self._none_since = now
            if ready:
                return choose([member for member in ready if member not in avoid] or ready, key)
            if reason := self._hopeless():
                raise NoRolloutCapacity(reason)
            left = (self._none_since or now) + self.config.capacity_timeout_s - now
            if left <= 0:
                raise NoRolloutCapacity(f"no server for {self.config.capacity_timeout_s:g} s: {self._reasons()}")
            await self.changed.wait(min([left, *self._tries_in(version)]) + 0.001)

    def _close(self, reason: str) -> None:
        for member in self.members:
            if not member.closed_because:
                member.close(reason)

    def take_budget(self, requests: int) -> float:
        """Seconds to wait until so many requests may be sent again."""
        self.counts["resent"] += requests
        return self._budget.wait_s(requests)

    def sent_first(self, requests: int) -> None:
        self.counts["sent"] += requests
        self._budget.sent_first(requests)

    def _tries_in(self, version: str) -> list[float]:
        """Seconds until members whose breakers are open may be tried."""
        return [
            member.breaker.opens_in for member in self.members if member.serves(version) and member.breaker.opens_in
        ]

    def _reasons(self) -> str:
        return "; ".join(f"{member.name}: {member.closed_because or 'its calls fail'}" for member in self.members)


class _Piece:
    """The requests of one call, until each has an outcome."""

    def __init__(self, pool: Pool, requests: list[Request], sampling: Sampling, versions: Versions):
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
            member = await self._pool.acquire(self._key, self._avoid)
            free = await self._try(member)
            if not self._waiting:
                break
            attempt += 1
            await self._pause(backoff_s(attempt))
            # The work of a server that is gone was never done: another one doing it is no additional load.
            if not (free or member.gone()):
                await self._pause(self._pool.take_budget(len(self._waiting)))
            if self._spent >= self._pool.config.give_up_s or self._refused >= REFUSALS:
                self._give_up()
        return [self._outcomes[place] for place in range(len(self._requests))]

    async def _pause(self, seconds: float) -> None:
        """Wait, but not beyond the time when the requests are given up."""
        self._spent += seconds
        await asyncio.sleep(max(0.0, min(seconds, seconds + self._pool.config.give_up_s - self._spent)))

    async def _try(self, member: PoolServer) -> bool:
        """Ask a member for what is missing; whether what is still missing may be sent again for free."""
        pool, places = self._pool, list(self._waiting)
        left = min(pool.request_timeout_s, pool.config.give_up_s - self._spent)
        began, tried, free = time.monotonic(), member.breaker.start(), False
        pool.counts["calls"] += 1
        asked = [self._waiting[place] for place in places]
        try:
            versions = self._versions.from_now_on()
            self._take(
                places, await member.call(member.client.generate(asked, self._sampling, versions, left), len(asked))
            )
        except Evicted as error:
            self._reason, free = str(error), True
        except NoRolloutCapacity as error:
            self._reason = str(error)
            self._refused += isinstance(error, Refused)
        except BaseException:
            member.breaker.release(tried)
            raise
        self._spent += time.monotonic() - began
        member.answered += len(places) - len(self._waiting)
        self._avoid = {member} if self._waiting else set()
        if len(self._waiting) < len(places):
            member.breaker.succeed()
        elif free:
            member.breaker.release(tried)
        else:
            member.breaker.fail(tried)
        if tried:
            pool.changed.notify()
        return free

    def _take(self, places: Sequence[int], replies: Sequence[Completion | BadReply]) -> None:
        for place, reply in zip(places, replies, strict=True):
            if isinstance(reply, BadReply):
                self._reason = str(reply)
            else:
                self._outcomes[place] = reply
                del self._waiting[place]
                self._pool.counts["answered"] += 1

    def _give_up(self) -> None:
        self._pool.counts["failed"] += len(self._waiting)
        for place, request in self._waiting.items():
            self._outcomes[place] = FailedRequest(request.id, self._reason)
        self._waiting = {}
