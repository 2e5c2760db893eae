"""Ports of this machine that are reserved until a program listens on them."""

from __future__ import annotations

import socket

_reserved: list[socket.socket] = []
"""Sockets that are bound and never listen. They end with this process."""


def reserve_ports(count: int) -> list[int]:
    """Different free ports of the loopback, which this process reserves for as long as it lives.

    The program that gets such a port listens on it seconds later. Until then any connection of this machine could take
    a port that is merely free. Linux assigns a bound port to no other socket, and lets a server listen on it where both
    sockets have SO_REUSEADDR, which servers set as a rule (torch's stores, asyncio, SLURM's daemons).
    """
    reserved = [socket.socket() for _ in range(count)]
    for bound in reserved:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(("127.0.0.1", 0))
    _reserved.extend(reserved)
    return [bound.getsockname()[1] for bound in reserved]
