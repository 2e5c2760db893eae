"""Retry budgets, backoff and waiting for a change: what prevents retries from overloading servers that recover."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable

SAVED_S = 10.0
"""Seconds of the floor that a retry budget may hold unused."""

Clock = Callable[[], float]


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
