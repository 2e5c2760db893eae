"""Where servers are, when a launcher starts them on other nodes: a text file that it writes, one address a line.

A line is ``http://host:port``; empty lines and what follows a ``#`` do not count. A launcher may append a line as each
server comes up: the reader waits for as many as it needs. Keys are never in the file: they come by the environment.
"""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from megatron_r1.errors import ConfigError, NoRolloutCapacity
from megatron_r1.files import write_whole

ADDRESS = re.compile(r"https?://[^/\s:]+:\d{1,5}")
POLL_S = 0.5


def write_addresses(path: Path, urls: Sequence[str]) -> None:
    """Write the file whole, so that no reader sees half of it."""
    write_whole(path, "".join(f"{url}\n" for url in urls).encode())


def read_addresses(path: Path, servers: int, timeout_s: float) -> list[str]:
    """The addresses in a file, when all servers are in it.

    Args:
        path: the file, which may not be there yet.
        servers: how many to wait for.
        timeout_s: seconds to wait.

    Raises:
        ConfigError: a line is no address, or an address stands there twice.
        NoRolloutCapacity: they did not come in time.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        urls = _addresses(path)
        if len(urls) >= servers:
            return urls
        if time.monotonic() > deadline:
            raise NoRolloutCapacity(f"{path}: has {len(urls)} of {servers} server addresses after {timeout_s:g} s")
        time.sleep(POLL_S)


def address_towards(url: str) -> str:
    """The address at which a server at `url` finds this machine: that of the interface that packets to it leave by."""
    split = urlsplit(url)
    try:
        kind, _, _, _, place = socket.getaddrinfo(split.hostname, split.port or 80, type=socket.SOCK_DGRAM)[0]
        with socket.socket(kind, socket.SOCK_DGRAM) as probe:
            probe.connect(place)  # sends nothing
            return str(probe.getsockname()[0])
    except OSError as error:
        raise NoRolloutCapacity(f"{url}: no way to it: {error}") from None


def _addresses(path: Path) -> list[str]:
    """The whole lines so far; one that a launcher is still writing has no end yet."""
    if not path.is_file():
        return []
    written, _, _ = path.read_text().rpartition("\n")
    lines = [line.partition("#")[0].strip() for line in written.splitlines()]
    urls = [line for line in lines if line]
    for number, url in enumerate(urls):
        if not ADDRESS.fullmatch(url):
            raise ConfigError(str(path), url, "must be http://host:port, one a line")
        if url in urls[:number]:
            raise ConfigError(str(path), url, "stands there twice")
    return urls
