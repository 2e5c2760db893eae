"""Registers the servers at an sglang-router that stands in front of them and spreads the requests.

Requests go to the router alone; control goes to each server directly. The router chooses among the registered servers;
what the pool promises (deadlines, retries, validated replies, counted failures) holds as without it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import aiohttp

from megatron_r1.errors import NoRolloutCapacity
from megatron_r1.rollout.sglang.client import Endpoint
from megatron_r1.rollout.sglang.pool.retries import StateChanged

logger = logging.getLogger(__name__)

CALL_S = 10.0
REGISTER_S = 60.0
POLL_S = 0.2
RECHECK_S = 10.0


class Router:
    """The servers that a router knows.

    Args:
        url: ``http://host:port`` of the router.
        session: keeps its connections.
    """

    def __init__(self, url: str, session: aiohttp.ClientSession):
        self.url, self._session = url, session

    async def workers(self) -> dict[str, str]:
        """Url -> the router's name, of the servers that it knows."""
        reply = await self._call("GET", "/workers")
        try:
            return {worker["url"]: worker["id"] for worker in reply["workers"]}
        except (KeyError, TypeError) as error:
            raise NoRolloutCapacity(f"{self.url}/workers: the reply lacks a field: {error!r}") from None

    async def set_workers(self, wanted: dict[str, Endpoint], ours: set[str]) -> None:
        """Make the router know these of our servers and no other of ours; those of others stay.

        Returns when the router lists them.

        Raises:
            NoRolloutCapacity: the router does not answer, or does not take a server in time.
        """
        known = await self.workers()
        for url in (known.keys() & ours) - wanted.keys():
            await self._call("DELETE", f"/workers/{known[url]}")
        for url in wanted.keys() - known.keys():
            await self._call("POST", "/workers", {"url": url, "api_key": wanted[url].api_key})
        try:
            async with asyncio.timeout(REGISTER_S):
                while (await self.workers()).keys() & ours != wanted.keys():
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            raise NoRolloutCapacity(f"{self.url}: the router did not take the servers {sorted(wanted)}") from None

    async def follow(self, wanted: Callable[[], dict[str, Endpoint]], ours: set[str], changed: StateChanged) -> None:
        """Keep the router's list current until cancelled."""
        while True:
            try:
                await self.set_workers(wanted(), ours)
            except NoRolloutCapacity as error:
                logger.error("%s", error)
            await changed.wait(RECHECK_S)

    async def _call(self, method: str, path: str, body: object | None = None) -> Any:
        try:
            async with (
                asyncio.timeout(CALL_S),
                self._session.request(method, self.url + path, json=body) as response,
            ):
                if response.status >= 400:
                    text = (await response.text())[:300]
                    raise NoRolloutCapacity(f"{self.url}{path}: status {response.status}: {text}")
                return await response.json(content_type=None)
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            raise NoRolloutCapacity(f"{self.url}{path}: {type(error).__name__}: {error}") from error
