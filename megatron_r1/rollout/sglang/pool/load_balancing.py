"""Which server a prompt goes to: the one that prefers it, unless it has more to do than the others.

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
    """What stands for a prompt in `choose`."""
    return blake2b(",".join(map(str, prompt_tokens)).encode(), digest_size=16).digest()


def preference(key: bytes, name: str) -> bytes:
    """How much a prompt prefers a server, comparable among servers."""
    return blake2b(name.encode(), digest_size=8, key=key).digest()


def choose[Server: Loaded](servers: Sequence[Server], key: bytes) -> Server:
    """The most preferred server whose load is not above the mean."""
    mean = sum(server.in_flight for server in servers) / len(servers)
    open_to_more = [server for server in servers if server.in_flight <= mean]
    return max(open_to_more, key=lambda server: preference(key, server.name))


def pieces(requests: Sequence[Request], largest: int) -> Iterator[list[Request]]:
    """Requests cut into calls, in order: neighbours of one prompt stay together.

    Groups that fit are put together up to `largest` requests; a group that alone is larger is cut.
    """
    piece: list[Request] = []
    for _, run in groupby(requests, key=lambda request: request.prompt_tokens):
        group = list(run)
        if piece and len(piece) + len(group) > largest:
            yield piece
            piece = []
        while len(group) > largest:
            yield group[:largest]
            group = group[largest:]
        piece += group
    if piece:
        yield piece
