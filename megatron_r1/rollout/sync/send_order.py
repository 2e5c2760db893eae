"""Who sends when, where several senders share the same servers.

An SGLang server takes one bucket at a time, in the order in which it hears of them. Two senders that broadcast to the
same servers at will could be heard in one order by one server and in another by the next, and then each server would
wait for a broadcast that the other has not joined. So senders take turns, bucket by bucket; what is done in parallel is
the gathering and packing of the next bucket.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from megatron_r1.parallel import comm


class SendOrder(Protocol):
    """One sender's turns; its buckets are numbered from 0."""

    alone: bool
    """Whether nobody waits for this sender, so that it may pack while a server still loads."""

    def take(self, number: int) -> bool:
        """Wait until bucket `number` may be sent; False when another sender has failed, and nobody shall send."""
        ...

    def give(self, number: int, fine: bool) -> None:
        """Bucket `number` has arrived, or will not."""
        ...

    def ends(self, number: int, last: bool) -> bool:
        """Whether bucket `number`, this sender's last or not, is the last of all."""
        ...


def round_robin(buckets: Sequence[int]) -> list[tuple[int, int]]:
    """The order in which senders send: (number of the bucket, place of the sender), given how many each has."""
    return sorted((number, place) for place, count in enumerate(buckets) for number in range(count))


class SingleSender:
    """The turns of a sender that has the servers to itself.

    Args:
        ends_session: whether its last bucket is the last of the session.
    """

    alone = True

    def __init__(self, ends_session: bool = True):
        self._ends_session = ends_session

    def take(self, number: int) -> bool:
        return True

    def give(self, number: int, fine: bool) -> None: ...

    def ends(self, number: int, last: bool) -> bool:
        return last and self._ends_session


class RoundRobin:
    """The turns of one of several ranks: each sends its next bucket, then the next rank does.

    Args:
        senders: the ranks.
        buckets: how many each of them has.
        rank: this one.
        tell: sends a flag to a rank.
        hear: waits for the flag of a rank.
    """

    def __init__(
        self,
        senders: Sequence[int],
        buckets: Sequence[int],
        rank: int,
        tell: Callable[[int, bool], None] = comm.send_flag,
        hear: Callable[[int], bool] = comm.recv_flag,
    ):
        self._order = [senders[place] for _, place in round_robin(buckets)]
        self._mine = [turn for turn, sender in enumerate(self._order) if sender == rank]
        self._rank, self._tell, self._hear = rank, tell, hear
        self._taken = self._given = 0
        self._fine = True
        self.alone = len(set(self._order)) == 1

    @property
    def buckets(self) -> int:
        """How many this rank has."""
        return len(self._mine)

    def take(self, number: int) -> bool:
        before = self._mine[number] - 1
        if before >= 0 and self._order[before] != self._rank:
            self._fine = self._hear(self._order[before]) and self._fine
        self._taken = number + 1
        return self._fine

    def give(self, number: int, fine: bool) -> None:
        self._fine = self._fine and fine
        after = self._mine[number] + 1
        if after < len(self._order) and self._order[after] != self._rank:
            self._tell(self._order[after], self._fine)
        self._given = number + 1

    def abandon(self) -> None:
        """Let the others know, in this sender's turns, that it has failed; without effect when all is sent."""
        for number in range(self._given, len(self._mine)):
            if number >= self._taken:
                self.take(number)
            self.give(number, False)

    def ends(self, number: int, last: bool) -> bool:
        return self._mine[number] == len(self._order) - 1
