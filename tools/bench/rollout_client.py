"""How many requests a second the pool's client sends, and whether it leaks: python tools/bench/rollout_client.py.

Servers are toys in processes of their own, so that what is measured is the client: building, sending, reading and
checking. Each request is a call of its own, as for groups of one; larger calls cost less per request.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import psutil

from megatron_r1.config.sglang import PoolConfig
from megatron_r1.rollout.engine import Request, Sampling, require_completions
from megatron_r1.rollout.sglang.client import Client, new_session
from megatron_r1.rollout.sglang.pool.pool import Pool
from megatron_r1.rollout.sglang.pool.server import PoolServer

ROOT = Path(__file__).resolve().parents[2]
SAMPLING = Sampling(1.0, 1.0, 32, (), 0)


class Look(NamedTuple):
    """What this process holds at a moment."""

    seconds: float
    """Since the start."""
    requests: int
    memory: int
    """Bytes."""
    descriptors: int


@asynccontextmanager
async def pool_at(urls: list[str], in_flight: int, key: str) -> AsyncIterator[Pool]:
    """A pool of servers that are known to serve version `v`."""
    config = PoolConfig(requests_per_call=1, in_flight_per_server=in_flight // len(urls))
    async with new_session() as session:
        members = [PoolServer(Client(url, key, "", 60.0, session), config, "v") for url in urls]
        for member in members:
            member.open()
        yield Pool(members, config, 60.0, ["v"])


def requests(count: int, prompt_tokens: int = 32) -> list[Request]:
    return [Request(str(number), tuple((number + place) % 1000 for place in range(prompt_tokens)))
            for number in range(count)]  # fmt: skip


class Rate(NamedTuple):
    """Requests a second."""

    clock: float
    """By the clock: what else runs on the machine counts."""
    core: float
    """By the time that the client had a core: what it could send with one to itself."""


async def rates(urls: list[str], key: str, in_flight: int, count: int, rounds: int) -> list[Rate]:
    """Requests a second, round by round."""
    found: list[Rate] = []
    asked = requests(count)
    async with pool_at(urls, in_flight, key) as pool:
        for _ in range(rounds):
            began, core_began = time.perf_counter(), time.process_time()
            require_completions(await pool.generate(asked, SAMPLING))
            found.append(Rate(count / (time.perf_counter() - began), count / (time.process_time() - core_began)))
    return found


async def soak(urls: list[str], key: str, in_flight: int, seconds: float, each_s: float = 10.0) -> list[Look]:
    """Keep `in_flight` requests under way for so long, and look at this process every `each_s`."""
    looks: list[Look] = []
    asked, done, began = requests(20 * in_flight), 0, time.monotonic()
    process = psutil.Process()
    async with pool_at(urls, in_flight, key) as pool:
        while (now := time.monotonic() - began) < seconds:
            if not looks or now - looks[-1].seconds >= each_s:
                gc.collect()
                looks.append(Look(now, done, process.memory_info().rss, process.num_fds()))
            require_completions(await pool.generate(asked, SAMPLING))
            done += len(asked)
    return looks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--servers", type=int, default=1, help="toy servers, each a process")
    parser.add_argument("--in-flight", type=int, default=256)
    parser.add_argument("--requests", type=int, default=3000, help="of one round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--soak-seconds", type=float, default=0.0)
    parser.add_argument("--reply-seconds", type=float, default=0.0, help="that a fake server takes for a response")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from tests.support.fake_sglang import KEY, fakes

    with fakes(options.servers, seconds=options.reply_seconds) as running:
        urls = [one.url for one in running]
        found = asyncio.run(rates(urls, KEY, options.in_flight, options.requests, options.rounds))
        for rate in found:
            print(f"{rate.clock:6.0f} requests a second by the clock, {rate.core:6.0f} a second of the client's core")
        if options.soak_seconds:
            for look in asyncio.run(soak(urls, KEY, options.in_flight, options.soak_seconds)):
                print(f"{look.seconds:6.0f} s  {look.requests:9d} requests  {look.memory / 1e6:7.1f} MB  "
                      f"{look.descriptors:4d} descriptors")  # fmt: skip


if __name__ == "__main__":
    main()
