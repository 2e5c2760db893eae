"""Sends weights to SGLang servers over a process group of its own: rank 0 sends, the servers' ranks receive.

Several senders, in one process or in several, may send to the same servers: rank 0 of the trainer opens the session
(`SGLangEngine.receiving`) and each sender sends its part. The group is made at the first send, used for all later ones,
and made again after a failure.

An SGLang server receives one bucket at a time, in the order in which requests reach it. Requests of two senders may
reach one server in one order and the next server in the other order; then each server would wait for a broadcast that
the other one has not joined: a deadlock. So senders alternate, bucket by bucket (`SendOrder`); what runs in
parallel is the gathering and packing of the next bucket.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any, Protocol, Self
from urllib.parse import urlsplit

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from torch.distributed import distributed_c10d as c10d

from megatron_r1.errors import NoRolloutCapacity
from megatron_r1.parallel import comm
from megatron_r1.rollout.sglang.client import Client, Endpoint
from megatron_r1.rollout.sync.buckets import Bucket, LooseBucket, NamedTensor, fill_buckets
from megatron_r1.rollout.sync.delta import SentBuckets

POLL_S = 0.001
MOST_ANNOUNCED = 2
"""Buckets announced to servers that have not loaded the first of them: one call travels while one bucket is loaded."""
FAILURE_REASON_S = 2.0
"""Seconds that a server may take to say why it left a broadcast."""
LEAVE_S = 10.0


class SendOrder(Protocol):
    """When one sender may send; its buckets are numbered from 0."""

    exclusive: bool
    """Whether no other sender waits for this one, so that it may pack while a server still loads."""

    def turn(self, bucket: int) -> AbstractContextManager[bool]:
        """Waits for the block in which the bucket is sent, at whose end the servers must have loaded it.

        Gives False when another sender has failed, and nobody may send.
        """
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

    def turn(self, bucket: int) -> AbstractContextManager[bool]:
        return nullcontext(True)

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
        self._begun = self._ended = 0
        self._ok = True
        self.exclusive = len(set(self._order)) == 1

    @property
    def buckets(self) -> int:
        """How many this rank has."""
        return len(self._mine)

    @contextmanager
    def turn(self, bucket: int) -> Iterator[bool]:
        before, after = self._mine[bucket] - 1, self._mine[bucket] + 1
        if bucket == self._begun:
            if before >= 0 and self._order[before] != self._rank:
                self._ok = self._recv_flag(self._order[before]) and self._ok
            self._begun += 1
        yield self._ok
        if after < len(self._order) and self._order[after] != self._rank:
            self._send_flag(self._order[after], self._ok)
        self._ended += 1

    def abandon(self) -> None:
        """Tell the other senders, in this sender's turns, that it has failed; no effect when all is sent."""
        for bucket in range(self._ended, len(self._mine)):
            with self.turn(bucket):
                self._ok = False

    def is_last(self, bucket: int, last_of_sender: bool) -> bool:
        return self._mine[bucket] == len(self._order) - 1


@dataclass(frozen=True)
class _Group:
    name: str
    process_group: dist.ProcessGroup
    store: Store
    """Held: ranks meet in it again when a backend connects late."""
    sent: SentBuckets | None
    """For deltas, what its servers have: a server that restarts, and any failure, ends the group and this with it."""


class GroupSender:
    """Rank 0 of a process group with all ranks of all servers.

    Args:
        endpoints: the servers.
        name: of this sender, unique among those of the same servers.
        tensor_parallel: ranks of one server.
        backend: ``gloo`` (any devices) or ``nccl`` (sender and servers on GPUs of their own).
        timeout_s: seconds that the group may take to form, and one bucket to arrive and be loaded.
        host: address of this machine for the servers; by default that of the interface which routes to them.
        delta: whether a bucket goes as what changed in it since it was last sent (delta.py), where that is smaller; the
            servers must take deltas, and get these weights from nobody else.
        packed: whether a bucket's tensors are copied into one that goes in a single broadcast, as deltas do too: what a
            GPU is faster with. Without, each goes from where it is, which must be host memory.
    """

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        name: str,
        tensor_parallel: int = 1,
        backend: str = "gloo",
        timeout_s: float = 300.0,
        host: str | None = None,
        delta: bool = False,
        packed: bool = False,
    ):
        self.name, self.backend = name, backend
        self._clients = [Client.at(endpoint, timeout_s) for endpoint in endpoints]
        self._leaving_clients = [Client.at(endpoint, LEAVE_S) for endpoint in endpoints]
        self._tensor_parallel, self._host = tensor_parallel, host or address_towards(endpoints[0].url)
        self._timeout, self._delta = timedelta(seconds=timeout_s), delta
        self._packed = packed or delta
        self._group: _Group | None = None
        self._works: deque[dist.Work] = deque()
        """Broadcasts under way."""
        self._replies: deque[tuple[str, Future[list[Any]]]] = deque()
        """Of buckets that servers may not have loaded yet: the label of each, and the servers' replies."""
        self._bucket: Bucket | None = None
        self._groups_made = 0
        self.sent_bytes = 0
        """To each server since the start."""
        self._threads = ThreadPoolExecutor(MOST_ANNOUNCED + 1, thread_name_prefix=f"send-{name}")

    def send(
        self,
        groups: Iterable[Sequence[NamedTensor]],
        bucket_bytes: int,
        *,
        version: str,
        order: SendOrder | None = None,
        flush_cache: bool = True,
    ) -> int:
        """Send tensors by their Hugging Face names; the servers must be in a session. Returns the number of buckets.

        Beside the tensors themselves one bucket of memory is held in each server while it receives and, where buckets
        are packed, here as long as the sender lives (and what was sent, for deltas). Where no other sender waits for
        the servers, it is refilled as soon as it has been broadcast, while they still load, and announced then: the
        servers go from one bucket to the next without a pause.

        Args:
            groups: of tensors that must be loaded together (payload.py), read one group at a time; packed, they are
                copied before the next one is requested, else they must stay as they are until this returns.
            bucket_bytes: most bytes of one bucket; a group that is larger makes one of its own.
            version: that the last bucket of all stamps.
            order: when this sender may send; None is a `SingleSender`.
            flush_cache: with the last bucket of all the servers drop what they have cached of the old weights.

        Raises:
            NoRolloutCapacity: a server did not take a bucket, or another sender has failed; the group is gone, and the
                next send makes a new one.
            DataError: there are no tensors.
        """
        order = order or SingleSender()
        sent = 0
        try:
            for bucket, last in fill_buckets(self._empty_bucket(bucket_bytes), groups):
                self._wait_loaded(but=MOST_ANNOUNCED - 1)
                with order.turn(sent) as may_send:
                    if not may_send:
                        raise NoRolloutCapacity(f"sender {self.name}: another sender of the same weights has failed")
                    if self._group is None:
                        self._join()
                    is_last = order.is_last(sent, last)
                    sent += 1
                    held = f"{bucket.entries[0].name} .. {bucket.entries[-1].name}"
                    label = f"sender {self.name}, bucket {sent} ({held})"
                    self._broadcast(label, sent, bucket, flush_cache and is_last, version if is_last else None)
                    if not order.exclusive:
                        self._wait_loaded()
            self._wait_loaded()
        except BaseException:
            self.leave()
            raise
        return sent

    def close(self) -> None:
        """Leave the group on both sides; may be called twice."""
        self.leave()
        self._bucket = None
        self._threads.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def _empty_bucket(self, capacity: int) -> Bucket | LooseBucket:
        """The bucket of the last send, whose memory was written before: new memory fills at half the speed."""
        if not self._packed:
            return LooseBucket(capacity)
        if self._bucket is None or self._bucket.capacity != capacity:
            self._bucket = None
            self._bucket = Bucket(capacity, "cuda" if self.backend == "nccl" else "cpu")
        self._bucket.clear()
        return self._bucket

    def _join(self) -> None:
        """Form the group with the servers, as SGLang forms its end of it: the same helper, the same store prefix."""
        self._groups_made += 1
        name = f"{self.name}-{self._groups_made}"
        size = 1 + len(self._clients) * self._tensor_parallel
        store = TCPStore(self._host, 0, size, is_master=True, timeout=self._timeout, wait_for_workers=False)
        posts = self._post(
            client.join_group(name, self.backend, self._host, store.port, 1 + index * self._tensor_parallel, size)
            for index, client in enumerate(self._clients)
        )
        try:
            process_group, _ = c10d._new_process_group_helper(
                size, 0, [], dist.Backend(self.backend), PrefixStore(name, store),
                group_name=c10d.GroupName(name), timeout=self._timeout,
            )  # fmt: skip
            assert isinstance(process_group, dist.ProcessGroup)
            c10d._world.pg_group_ranks[process_group] = {rank: rank for rank in range(size)}
        except RuntimeError as error:
            if posts.done():
                posts.result()  # raises the server's own reason, which says more
            reason = str(error).splitlines()[0][:300]
            raise NoRolloutCapacity(f"sender {self.name}: the servers did not join its group: {reason}") from error
        self._group = _Group(name, process_group, store, SentBuckets() if self._delta else None)
        del process_group  # see `leave`
        posts.result()

    def _broadcast(
        self, label: str, number: int, bucket: Bucket | LooseBucket, flush_cache: bool, version: str | None
    ) -> None:
        """Send a bucket's bytes; returns when they are sent, before the servers reply (`_wait_loaded`)."""
        assert self._group is not None
        name, sent = self._group.name, self._group.sent
        described, parts = bucket.description(), bucket.parts
        if sent:
            assert isinstance(bucket, Bucket)
            described, parts = sent.message(number, bucket)
        self.sent_bytes += sum(part.nbytes for part in parts)
        calls = [client.receive(name, described, flush_cache, version) for client in self._clients]
        self._replies.append((label, replies := self._post(calls)))
        try:
            self._works.extend(self._group.process_group.broadcast(part, 0) for part in parts)
            while self._works:
                while not self._works[0].is_completed():
                    self._raise_failures()
                    if replies.done():
                        time.sleep(POLL_S)
                    wait([replies], timeout=POLL_S)
                self._works[0].wait()
                self._works.popleft()
        except RuntimeError as error:
            wait([replies], timeout=FAILURE_REASON_S)
            self._raise_failures()
            raise _failure(label, error) from error

    def _raise_failures(self) -> None:
        """Raise what a server replied against a bucket, that of the first bucket first."""
        for label, replies in self._replies:
            if replies.done():
                _result(label, replies)

    def _wait_loaded(self, but: int = 0) -> None:
        """Wait until the servers have loaded all buckets but so many, the last ones."""
        while len(self._replies) > but:
            _result(*self._replies[0])
            self._replies.popleft()

    def leave(self) -> None:
        """Leave the group, which may hang in a broadcast; the next send makes a new one.

        A broadcast cannot be cancelled, but it fails at once when the other side closes. So the servers leave first;
        those that hang themselves follow when this side has closed, which is when its last reference goes: this object
        alone holds it, no frames that a traceback holds.
        """
        group, self._group = self._group, None
        works, self._works = self._works, deque()
        self._replies.clear()
        if group is None:
            return
        posts = self._post((client.leave_group(group.name) for client in self._leaving_clients), tolerant=True)
        with suppress(RuntimeError):  # the first that fails; the others do then
            while works:
                works[0].wait(timedelta(seconds=LEAVE_S))
                works.popleft()
        dist.destroy_process_group(group.process_group)
        del group, works
        posts.result()

    def _post(self, calls: Iterable[Coroutine[Any, Any, None]], tolerant: bool = False) -> Future[list[Any]]:
        """Run calls to all servers at the same time, in another thread; the first failure cancels the others."""
        coroutines = list(calls)

        async def together() -> list[Any]:
            results: list[Any] = await asyncio.gather(*coroutines, return_exceptions=tolerant)
            return results

        return self._threads.submit(lambda: asyncio.run(together()))


def _result(label: str, replies: Future[list[Any]]) -> None:
    """Wait for the servers' replies to a bucket; raise what one of them replies against it."""
    try:
        replies.result()
    except NoRolloutCapacity as error:
        raise _failure(label, error) from error


def _failure(label: str, error: Exception) -> NoRolloutCapacity:
    return NoRolloutCapacity(f"{label}: {str(error).splitlines()[0][:300]}")


def address_towards(url: str) -> str:
    """The address at which a server at `url` finds this machine: that of the interface which routes to it."""
    split = urlsplit(url)
    try:
        kind, _, _, _, remote = socket.getaddrinfo(split.hostname, split.port or 80, type=socket.SOCK_DGRAM)[0]
        with socket.socket(kind, socket.SOCK_DGRAM) as probe:
            probe.connect(remote)  # sends nothing
            return str(probe.getsockname()[0])
    except OSError as error:
        raise NoRolloutCapacity(f"{url}: no way to it: {error}") from None
