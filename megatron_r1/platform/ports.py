"""Ports of this machine, kept for programs that will listen on them."""

from __future__ import annotations

import socket

_kept: list[socket.socket] = []
"""Sockets that are bound and never listen. They end with this process."""


def free_ports(count: int) -> list[int]:
    """Different ports of the loopback that only a program that is told of them can use, as long as this process lives.

    That program starts seconds later, and meanwhile any connection of this machine could take a port that is merely
    free. Linux gives a bound port to nobody, and lets a server listen on it where both sockets have SO_REUSEADDR, which
    servers set as a rule (torch's stores, asyncio, SLURM's daemons).
    """
    for _ in range(count):
        kept = socket.socket()
        kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        kept.bind(("127.0.0.1", 0))
        _kept.append(kept)
    return [kept.getsockname()[1] for kept in _kept[len(_kept) - count :]]
