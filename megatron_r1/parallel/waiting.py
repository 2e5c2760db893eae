"""Ranks wait for a rank that works without a collective operation that is pending meanwhile.

A collective operation fails on every rank that has joined it when another has not joined in time. A rollout, the start
of servers or a save may take any time, so ranks first wait for a key of the job's store, and join when the rank that
they wait for does. A thread of each rank sends heartbeats to the store, by which the others know that it is alive.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch.distributed as dist

from megatron_r1.errors import RankLost

HEARTBEAT_S = 15.0
"""Seconds between two heartbeats of a rank; each is a number that it counts up."""
LEFT = "left"
"""In their place once the rank has ended."""


class Waiting:
    """The ranks of one job; its methods are collective over them, each called by one thread of a rank."""

    def __init__(self, store: dist.Store, rank: int, ranks: int, heartbeat_timeout_s: float):
        """
        Args:
            store: of all ranks. A wait occupies its connection, so each thread has one of its own.
            heartbeat_timeout_s: seconds after which a rank that sends no heartbeat is lost.
        """
        self._store, self._rank, self._ranks, self._timeout_s = store.clone(), rank, ranks, heartbeat_timeout_s
        self._heartbeat_s = min(HEARTBEAT_S, heartbeat_timeout_s / 4)
        self._waits = 0
        self._keys: list[str] = []
        """Of waits that some ranks may not have left."""
        self._stopped = threading.Event()
        self._thread = threading.Thread(
            target=self._send_heartbeats, args=(store.clone(),), name="heartbeats", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Send no more heartbeats, and say so: others that still wait for this rank wait in vain."""
        self._stopped.set()
        self._thread.join()
        with suppress(dist.DistNetworkError):
            self._store.set(_heartbeat_key(self._rank), LEFT)

    def for_rank(self, rank: int) -> None:
        """Return when `rank` has called this too.

        Raises:
            RankLost: it sends no heartbeat.
        """
        key = self._next_key()
        if rank == self._rank:
            self._store.set(key, "")
        else:
            self._wait(key, [rank])

    def for_all(self) -> None:
        """Return when all ranks have called this.

        Raises:
            RankLost: one sends no heartbeat; rank 0 watches all others, and they watch rank 0.
        """
        left, self._keys = self._keys, []  # by all that come here
        key = self._next_key()
        self._keys.append(f"{key}/ranks")
        if self._store.add(f"{key}/ranks", 1) == self._ranks:
            self._store.set(key, "")
        else:
            self._wait(key, range(1, self._ranks) if self._rank == 0 else [0])
        for old in left if self._rank == 0 else ():
            self._store.delete_key(old)

    def _next_key(self) -> str:
        self._waits += 1
        self._keys.append(f"wait/{self._waits}")
        return self._keys[-1]

    def _wait(self, key: str, ranks: Iterable[int]) -> None:
        last = {rank: (b"", time.monotonic()) for rank in ranks}  # heartbeat, and when it came
        while not self._is_set_soon(key):
            now = time.monotonic()
            for rank, heartbeat in zip(
                last, self._store.multi_get([_heartbeat_key(rank) for rank in last]), strict=True
            ):
                before, since = last[rank]
                if heartbeat == LEFT.encode() and not self._store.check([key]):  # it may have set it before it left
                    raise RankLost(f"rank {rank} has ended")
                if heartbeat != before:
                    last[rank] = heartbeat, now
                elif now - since > self._timeout_s:
                    raise RankLost(f"rank {rank} has sent no heartbeat for {now - since:.0f} s")

    def _is_set_soon(self, key: str) -> bool:
        try:
            self._store.wait([key], timedelta(seconds=self._heartbeat_s))
        except dist.DistStoreError:  # the time is over
            return False
        return True

    def _send_heartbeats(self, store: dist.Store) -> None:
        with suppress(dist.DistNetworkError):  # rank 0, which keeps the store, has ended
            while not self._stopped.is_set():
                store.add(_heartbeat_key(self._rank), 1)
                self._stopped.wait(self._heartbeat_s)


def _heartbeat_key(rank: int) -> str:
    return f"alive/{rank}"


_job: list[Waiting] = []
_jobs = 0


@contextmanager
def waiting(store: dist.Store | None, rank: int, ranks: int, heartbeat_timeout_s: float) -> Iterator[None]:
    """Meanwhile `wait_for_rank` and `wait_for_all` are of these ranks; None, the store of a single rank, has none."""
    global _jobs
    if store is None:
        yield
        return
    _jobs += 1  # a store may outlive a job, and has its keys
    _job.append(Waiting(dist.PrefixStore(f"megatron_r1/{_jobs}", store), rank, ranks, heartbeat_timeout_s))
    try:
        yield
    finally:
        _job.pop().close()


def wait_for_rank(rank: int) -> None:
    """Collective: return when `rank` has called this too; raises as of `Waiting`."""
    for job in _job[-1:]:
        job.for_rank(rank)


def wait_for_all() -> None:
    """Collective: return when all ranks have called this; raises as of `Waiting`."""
    for job in _job[-1:]:
        job.for_all()
