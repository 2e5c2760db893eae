"""Sends weights to SGLang servers over a process group of its own: rank 0 sends, the servers' ranks receive.

Several senders, in one process or in several, may serve the same servers in turns (turns.py): whoever owns the engine
opens the session (`SGLangEngine.receiving`) and each sender sends its part. The group is made at the first send, used
for all later ones, and made anew after a failure.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any, Self

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from megatron_r1.errors import NoRolloutCapacity
from megatron_r1.rollout.sglang.client import Client, Endpoint
from megatron_r1.rollout.sglang.servers.address_file import address_towards
from megatron_r1.rollout.sync.buckets import Bucket, NamedTensor, filled
from megatron_r1.rollout.sync.send_order import SendOrder, SingleSender

POLL_S = 0.001
MOST_UNDER_WAY = 2
"""Buckets that servers are told of before they have loaded the first: the call for one travels while one is loaded."""
LAST_WORDS_S = 2.0
"""Seconds that a server may take to say why it left a broadcast."""
FAREWELL_S = 10.0


@dataclass(frozen=True)
class _Group:
    name: str
    process_group: dist.ProcessGroup
    store: dist.Store
    """Kept: ranks meet in it again when a backend connects late."""


class GroupSender:
    """Rank 0 of a group with all ranks of all servers.

    Args:
        endpoints: the servers.
        name: tells this sender from others of the same servers.
        tensor_parallel: ranks of one server.
        backend: ``gloo`` (any devices) or ``nccl`` (sender and servers on GPUs of their own).
        timeout_s: seconds that the group may take to form, and one bucket to arrive and be loaded.
        host: address of this machine at which the servers find the sender; by default the one that leads to them.
    """

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        name: str,
        tensor_parallel: int = 1,
        backend: str = "gloo",
        timeout_s: float = 300.0,
        host: str | None = None,
    ):
        self.name, self.backend = name, backend
        self._clients = [Client.at(endpoint, timeout_s) for endpoint in endpoints]
        self._last_clients = [Client.at(endpoint, FAREWELL_S) for endpoint in endpoints]
        self._tensor_parallel, self._host = tensor_parallel, host or address_towards(endpoints[0].url)
        self._timeout = timedelta(seconds=timeout_s)
        self._group: _Group | None = None
        self._work: dist.Work | None = None
        self._replies: deque[tuple[str, Future[list[Any]]]] = deque()
        """Of buckets that servers may not have loaded yet: what each is called, and their replies."""
        self._bucket: Bucket | None = None
        self._groups_made = 0
        self._threads = ThreadPoolExecutor(MOST_UNDER_WAY + 1, thread_name_prefix=f"send-{name}")

    def send(
        self,
        units: Iterable[Sequence[NamedTensor]],
        bucket_bytes: int,
        *,
        version: str,
        turns: SendOrder | None = None,
        flush_cache: bool = True,
    ) -> int:
        """Send tensors by their Hugging Face names; the servers must be in a session. Returns the number of buckets.

        Beside the tensors themselves one bucket of memory is held: here as long as the sender lives, and in each server
        while it receives. Where nobody else waits for the servers, it is filled anew as soon as it has been broadcast,
        while they still load, and they are told of it then: they go from one bucket to the next without a pause.

        Args:
            units: tensors that belong together (fused.py), read one unit at a time and copied before the next is asked
                for.
            bucket_bytes: most bytes of one bucket; a unit that is larger makes one of its own.
            version: what the last bucket of all stamps.
            turns: when this sender may send; None has the servers to itself.
            flush_cache: with the last bucket of all the servers drop what they have cached of the old weights.

        Raises:
            NoRolloutCapacity: a server did not take a bucket, or another sender has failed; the group is gone, and the
                next send makes a new one.
            DataError: there are no tensors.
        """
        turns = turns or SingleSender()
        sent = 0
        try:
            for bucket, last in filled(self._empty_bucket(bucket_bytes), units):
                self._settle(but=MOST_UNDER_WAY - 1)
                if not turns.take(sent):
                    raise NoRolloutCapacity(f"sender {self.name}: another sender of the same weights has failed")
                if self._group is None:
                    self._form()
                ends = turns.ends(sent, last)
                sent += 1
                held = f"{bucket.items[0].name} .. {bucket.items[-1].name}"
                label = f"sender {self.name}, bucket {sent} ({held})"
                self._broadcast(label, bucket, flush_cache and ends, version if ends else None)
                if not turns.alone:
                    self._settle()
                    turns.give(sent - 1, True)
            self._settle()
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

    def _empty_bucket(self, capacity: int) -> Bucket:
        """The bucket of the last send, whose memory has been touched before: new memory fills at half the speed."""
        if self._bucket is None or self._bucket.capacity != capacity:
            self._bucket = None
            self._bucket = Bucket(capacity, "cuda" if self.backend == "nccl" else "cpu")
        self._bucket.clear()
        return self._bucket

    def _form(self) -> None:
        """Make the group as SGLang makes its end of it: the same helper, the same store prefix."""
        self._groups_made += 1
        name = f"{self.name}-{self._groups_made}"
        size = 1 + len(self._clients) * self._tensor_parallel
        store = dist.TCPStore(self._host, 0, size, is_master=True, timeout=self._timeout, wait_for_workers=False)
        posts = self._post(
            client.join_group(name, self.backend, self._host, store.port, 1 + place * self._tensor_parallel, size)
            for place, client in enumerate(self._clients)
        )
        try:
            process_group, _ = c10d._new_process_group_helper(
                size, 0, [], dist.Backend(self.backend), dist.PrefixStore(name, store),
                group_name=c10d.GroupName(name), timeout=self._timeout,
            )  # fmt: skip
            assert isinstance(process_group, dist.ProcessGroup)
            c10d._world.pg_group_ranks[process_group] = {rank: rank for rank in range(size)}
        except RuntimeError as error:
            if posts.done():
                posts.result()  # the server's own reason is the better one
            reason = str(error).splitlines()[0][:300]
            raise NoRolloutCapacity(f"sender {self.name}: the servers did not join its group: {reason}") from error
        self._group = _Group(name, process_group, store)
        del process_group  # see `leave`
        posts.result()

    def _broadcast(self, label: str, bucket: Bucket, flush_cache: bool, version: str | None) -> None:
        """Send a bucket's bytes; returns when they have left, with the servers' replies to come (`_settle`)."""
        assert self._group is not None
        name, description = self._group.name, bucket.description()
        calls = [client.receive(name, description, flush_cache, version) for client in self._clients]
        self._replies.append((label, replies := self._post(calls)))
        try:
            self._work = self._group.process_group.broadcast(bucket.content, 0)
            while not self._work.is_completed():
                self._hear()
                if replies.done():
                    time.sleep(POLL_S)
                wait([replies], timeout=POLL_S)
            if self._work.exception() is not None:
                wait([replies], timeout=LAST_WORDS_S)
                self._hear()
            self._work.wait()
            self._work = None
        except RuntimeError as error:
            raise _failure(label, error) from error

    def _hear(self) -> None:
        """Raise what a server has said against a bucket, the first before the next."""
        for label, replies in self._replies:
            if replies.done():
                _result(label, replies)

    def _settle(self, but: int = 0) -> None:
        """Wait until the servers have loaded what was broadcast, but for so many buckets, the last ones."""
        while len(self._replies) > but:
            _result(*self._replies[0])
            self._replies.popleft()

    def leave(self) -> None:
        """Leave the group, which may be stuck in a broadcast; the next send makes a new one.

        A broadcast cannot be called off, but it fails at once when the other side closes. So the servers leave first;
        those that are stuck themselves follow when this side has closed, which is when its last reference goes: it is
        held by this object alone, not by frames that a traceback keeps.
        """
        group, self._group = self._group, None
        work, self._work = self._work, None
        self._replies.clear()
        if group is None:
            return
        posts = self._post((client.leave_group(group.name) for client in self._last_clients), tolerant=True)
        if work is not None:
            with contextlib.suppress(RuntimeError):
                work.wait(timedelta(seconds=FAREWELL_S))
        dist.destroy_process_group(group.process_group)
        del group, work
        posts.result()

    def _post(self, calls: Iterable[Any], tolerant: bool = False) -> Future[list[Any]]:
        """Run calls to all servers at the same time, in another thread; the first failure ends the others."""
        coroutines = list(calls)

        async def together() -> list[Any]:
            return await asyncio.gather(*coroutines, return_exceptions=tolerant)

        return self._threads.submit(lambda: asyncio.run(together()))


def _result(label: str, replies: Future[list[Any]]) -> None:
    """Wait for the servers' replies about a bucket; raise what one of them says against it."""
    try:
        replies.result()
    except NoRolloutCapacity as error:
        raise _failure(label, error) from error


def _failure(label: str, error: Exception) -> NoRolloutCapacity:
    return NoRolloutCapacity(f"{label}: {str(error).splitlines()[0][:300]}")
