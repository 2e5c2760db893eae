"""Circuit breakers, retry budgets and backoff: what prevents retries from overloading servers that recover."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable

LONGEST_COOLDOWN = 32
"""Most that repeated failures lengthen a breaker's cooldown, as a factor."""
SAVED_S = 10.0
"""Seconds of the floor that a retry budget may hold unused."""

Clock = Callable[[], float]


class Breaker:
    """A circuit breaker (Nygard, Release It!, chapter 5): closed, open, and half open for one trial call.

    Args:
        failures: failures in a row that open it.
        cooldown_s: seconds that it stays open; doubled by every trial that fails.
        clock: monotonic seconds.
    """

    def __init__(self, failures: int, cooldown_s: float, clock: Clock = time.monotonic):
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


class RetryBudget:
    """Requests may be sent again as a share of those sent first, and at a floor whatever was sent.

    (A retry budget as in Finagle and in the SRE book, chapter 21.) What the budget does not allow waits.

    Args:
        share: allowed repetitions for each first request.
        floor_per_s: allowed repetitions a second, beside the share.
        clock: monotonic seconds.
    """

    def __init__(self, share: float, floor_per_s: float, clock: Clock = time.monotonic):
        self._share, self._floor, self._clock = share, floor_per_s, clock
        self._earned = 0.0
        self._saved, self._at = floor_per_s * SAVED_S, clock()

    def sent_first(self, requests: int) -> None:
        self._earned += requests * self._share

    def wait_s(self, requests: int) -> float:
        """Take `requests` repetitions; returns the seconds to wait before sending them, 0 where there is budget."""
        now = self._clock()
        self._saved = min(self._saved + (now - self._at) * self._floor, self._floor * SAVED_S)
        self._at = now
        shared = min(self._earned, requests)
        self._earned -= shared
        self._saved -= requests - shared  # below 0: the debt is what later ones wait for as well
        return max(0.0, -self._saved / self._floor)


def backoff_s(attempt: int, base_s: float = 0.05, longest_s: float = 5.0) -> float:
    """Seconds before attempt number `attempt` (1 is the first repetition): exponential, with full jitter."""
    return random.uniform(0.0, min(longest_s, base_s * 2 ** (attempt - 1)))


class StateChanged:
    """Wakes all that wait for something to change."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def notify(self) -> None:
        self._event.set()
        self._event = asyncio.Event()

    async def wait(self, longest_s: float) -> None:
        """Return at the next `notify`, or after `longest_s`."""
        try:
            async with asyncio.timeout(longest_s):
                await self._event.wait()
        except TimeoutError:
            return
