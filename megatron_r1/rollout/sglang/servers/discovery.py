"""Finds servers that somebody else started: listed in the configuration, in a file, or on the nodes of a SLURM job.

A launcher writes the file, one ``http://host:port`` a line; empty lines and what follows a ``#`` do not count. It may
append a line as each server comes up: the reader waits for as many as it needs. Keys are never in the file: they come
by the environment.
"""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

from megatron_r1.config.sglang import SGLangConfig
from megatron_r1.errors import ConfigError, NoRolloutCapacity
from megatron_r1.platform.api_keys import api_key
from megatron_r1.rollout.sglang.client import Endpoint
from megatron_r1.rollout.sglang.servers import slurm

API_KEY, ADMIN_KEY = "SGLANG_API_KEY", "SGLANG_ADMIN_API_KEY"
"""Environment variables of the keys: an argument or a configuration file would show them."""
ADDRESS = re.compile(r"https?://[^/\s:]+:\d{1,5}")
POLL_S = 0.5


def external_endpoints(config: SGLangConfig) -> list[Endpoint]:
    """The servers of `rollout.sglang.addresses`, of `address_file` or of `slurm`; waits for those of the last two.

    Raises:
        ConfigError: a line of the file is no address, or this SLURM job has no such nodes.
        NoRolloutCapacity: the file does not name all servers in time, or one on the job's nodes does not answer.
    """
    keys = api_key(API_KEY), api_key(ADMIN_KEY)
    urls = config.addresses
    if config.address_file:
        urls = read_addresses(Path(config.address_file), config.servers, config.start_timeout_s)
    if config.slurm.nodes != "none":
        urls = slurm.addresses(config.slurm, os.environ)
        slurm.wait_for(urls, config.start_timeout_s)
    return [Endpoint(url, *keys) for url in urls]


def read_addresses(path: Path, servers: int, timeout_s: float) -> list[str]:
    """The addresses in a file, once it has those of all servers.

    Args:
        path: the file, which may not exist yet.
        servers: how many to wait for.
        timeout_s: seconds to wait.

    Raises:
        ConfigError: a line is no address, or an address occurs twice.
        NoRolloutCapacity: the file does not have them in time.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        urls = _whole_lines(path)
        if len(urls) >= servers:
            return urls
        if time.monotonic() > deadline:
            raise NoRolloutCapacity(f"{path}: has {len(urls)} of {servers} server addresses after {timeout_s:g} s")
        time.sleep(POLL_S)


def _whole_lines(path: Path) -> list[str]:
    """The addresses so far; a line that a launcher is still writing has no end yet and does not count."""
    if not path.is_file():
        return []
    written, _, _ = path.read_text("utf-8-sig").rpartition("\n")
    lines = [line.partition("#")[0].strip() for line in written.splitlines()]
    urls = [line for line in lines if line]
    for number, url in enumerate(urls):
        if not ADDRESS.fullmatch(url):
            raise ConfigError(str(path), url, "must be http://host:port, one a line")
        if url in urls[:number]:
            raise ConfigError(str(path), url, "occurs twice")
    return urls
