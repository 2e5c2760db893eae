"""Servers that another process started, as an engine that weights can be sent to: addresses from a file, keys by the
environment."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp

from megatron_r1.files import write_whole
from megatron_r1.rollout.sglang.client import Client, Endpoint
from megatron_r1.rollout.sglang.servers.discovery import read_addresses

KEYS = "MEGATRON_R1_TEST_KEYS"
TIMEOUT_S = 60.0
BUCKET = 100_000
"""Bytes that ranks_sync.py sends at a time."""


def write_addresses(path: Path, urls: Sequence[str]) -> None:
    """What a launcher does, in one go: no reader sees half of the file."""
    write_whole(path, "".join(f"{url}\n" for url in urls).encode())


@contextmanager
def announced(path: Path, endpoints: Sequence[Endpoint]) -> Iterator[None]:
    """Write where the servers are; processes that are started in the block are given the keys."""
    write_addresses(path, [endpoint.url for endpoint in endpoints])
    os.environ[KEYS] = json.dumps([[endpoint.api_key, endpoint.admin_key] for endpoint in endpoints])
    try:
        yield
    finally:
        del os.environ[KEYS]


def find(path: Path) -> list[Endpoint]:
    """The servers that were `announced`."""
    keys = json.loads(os.environ[KEYS])
    return [Endpoint(url, *pair) for url, pair in zip(read_addresses(path, len(keys), 5.0), keys, strict=True)]


async def generate_raw(
    endpoint: Endpoint, body: dict[str, Any], started: asyncio.Event | None = None
) -> dict[str, Any]:
    """SGLang's own reply to one /generate call, sent past the engine and its client.

    Args:
        started: is set as soon as the server has sampled a token.
    """
    headers, reply = {"Authorization": f"Bearer {endpoint.api_key}"}, dict[str, Any]()
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{endpoint.url}/generate", json=body | {"stream": True}, headers=headers) as response,
    ):
        async for line in response.content:
            if line.startswith(b"data: {"):
                reply = json.loads(line.removeprefix(b"data: "))
                if started:
                    started.set()
    return reply


class Attached:
    """Their control, without their processes."""

    def __init__(self, endpoints: Sequence[Endpoint]):
        self._clients = [Client.at(endpoint, TIMEOUT_S) for endpoint in endpoints]
        self._version = ""
        self.restarts = 0

    @contextmanager
    def receiving(self, version: str) -> Iterator[None]:
        self.all(client.begin_update() for client in self._clients)
        try:
            yield
        finally:
            self.all(client.end_update() for client in self._clients)
        self.all(client.confirm(version) for client in self._clients)
        self._version = version

    def checksums(self) -> list[dict[str, str]]:
        """Of every server."""
        return self.all(client.checksums() for client in self._clients)

    def generate(self, requests: Any, sampling: Any) -> list[Any]:
        """Every server's completions of all requests, one server after the other."""
        completions = self.all(client.generate(requests, sampling, (self._version,)) for client in self._clients)
        return [one for answered in completions for one in answered]

    def all(self, calls: Any) -> list[Any]:
        async def together() -> list[Any]:
            return await asyncio.gather(*calls)

        return asyncio.run(together())
