"""A limit on what is under way that keeps the order."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class InFlightLimit:
    """So many requests may be under way; who came first is let in first, however many they are."""

    def __init__(self, count: int):
        self._count, self._free = count, asyncio.Semaphore(count)
        self._turn = asyncio.Lock()

    @asynccontextmanager
    async def taken(self, requests: int) -> AsyncIterator[None]:
        """Hold slots for so many requests; more than there are take all."""
        wanted, held = min(requests, self._count), 0
        try:
            async with self._turn:
                for _ in range(wanted):
                    await self._free.acquire()
                    held += 1
            yield
        finally:
            for _ in range(held):
                self._free.release()
