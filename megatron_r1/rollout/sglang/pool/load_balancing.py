"""Chooses the server for a prompt: the most preferred one, unless it has more requests in flight than the others.

Preference is by rendezvous hashing (Thaler and Ravishankar, 1998): without a table, a prompt keeps its server while the
set of servers changes around it. The bound on load is that of consistent hashing with bounded loads (Mirrokni, Thorup
and Zadimoghaddam, 2018) at its tightest: no server above the mean gets more.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from itertools import groupby
from typing import Protocol

from megatron_r1.rollout.sample import Request


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
