"""The order in which several senders of weights use the same servers.

An SGLang server takes one bucket at a time, in the order in which it hears of them. Two senders that broadcast to the
same servers at will could be heard in one order by one server and in another by the next, and then each server would
wait for a broadcast that the other has not joined. So senders alternate, bucket by bucket; what runs in parallel is the
gathering and packing of the next bucket.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from megatron_r1.parallel import comm


class SendOrder(Protocol):
    """When one sender may send; its buckets are numbered from 0."""

    exclusive: bool
    """Whether no other sender waits for this one, so that it may pack while a server still loads."""

    def acquire(self, bucket: int) -> bool:
        """Wait until the bucket may be sent; False when another sender has failed, and nobody may send."""
        ...

    def release(self, bucket: int, ok: bool) -> None:
        """The servers have loaded the bucket, or will not."""
        ...

    def is_last(self, bucket: int, last_of_sender: bool) -> bool:
        """Whether the bucket is the last of all senders."""
        ...


def round_robin(buckets: Sequence[int]) -> list[tuple[int, int]]:
    """The order of all buckets: (number of the bucket, index of the sender), given how many each sender has."""
    return sorted((bucket, sender) for sender, count in enumerate(buckets) for bucket in range(count))


class SingleSender:
    """The order of a sender that shares the servers with no other at the time.

    Args:
        ends_session: whether its last bucket is the last of the session.
    """

    exclusive = True

    def __init__(self, ends_session: bool = True):
        self._ends_session = ends_session

    def acquire(self, bucket: int) -> bool:
        return True

    def release(self, bucket: int, ok: bool) -> None: ...

    def is_last(self, bucket: int, last_of_sender: bool) -> bool:
        return last_of_sender and self._ends_session


class RoundRobin:
    """The order of one of several ranks: each sends its next bucket, then the next rank does.

    Args:
        senders: the ranks.
        buckets: how many each of them has.
        rank: this one.
        send_flag: sends a flag to a rank.
        recv_flag: waits for the flag of a rank.
    """

    def __init__(
        self,
        senders: Sequence[int],
        buckets: Sequence[int],
        rank: int,
        send_flag: Callable[[int, bool], None] = comm.send_flag,
        recv_flag: Callable[[int], bool] = comm.recv_flag,
    ):
        self._order = [senders[sender] for _, sender in round_robin(buckets)]
        self._mine = [position for position, sender in enumerate(self._order) if sender == rank]
        self._rank, self._send_flag, self._recv_flag = rank, send_flag, recv_flag
        self._acquired = self._released = 0
        self._ok = True
        self.exclusive = len(set(self._order)) == 1

    @property
    def buckets(self) -> int:
        """How many this rank has."""
        return len(self._mine)

    def acquire(self, bucket: int) -> bool:
        before = self._mine[bucket] - 1
        if before >= 0 and self._order[before] != self._rank:
            self._ok = self._recv_flag(self._order[before]) and self._ok
        self._acquired = bucket + 1
        return self._ok

    def release(self, bucket: int, ok: bool) -> None:
        self._ok = self._ok and ok
        after = self._mine[bucket] + 1
        if after < len(self._order) and self._order[after] != self._rank:
            self._send_flag(self._order[after], self._ok)
        self._released = bucket + 1

    def abandon(self) -> None:
        """Tell the other senders, in this sender's turns, that it has failed; no effect when all is sent."""
        for bucket in range(self._released, len(self._mine)):
            if bucket >= self._acquired:
                self.acquire(bucket)
            self.release(bucket, False)

    def is_last(self, bucket: int, last_of_sender: bool) -> bool:
        return self._mine[bucket] == len(self._order) - 1
