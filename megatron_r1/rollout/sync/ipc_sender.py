"""Sends weights to SGLang servers of this machine through memory that both map (CUDA IPC, or shared memory on a CPU).

The servers get a handle of a bucket: on CUDA an IPC handle, with which a server reads the trainer's memory on the same
GPU, or over NVLink on another one; on a CPU the name of a file in shared memory. Bytes are copied twice, into the
bucket and out of it. Beside the weights of both sides, one bucket of memory is held while weights are sent.

A handle is a pickle, which this side makes of its own objects and a server of this machine reads, by a list of allowed
types; nothing is unpickled here. It counts who uses the memory, so each rank of each server gets one of its own.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.reduction import ForkingPickler
from types import SimpleNamespace, TracebackType
from typing import Self

import torch
from torch import multiprocessing  # it teaches ForkingPickler tensors

from megatron_r1.errors import NoRolloutCapacity
from megatron_r1.rollout.sglang.client import Client, Endpoint, run_all
from megatron_r1.rollout.sync.buckets import Bucket, NamedTensor, fill_buckets
from megatron_r1.rollout.sync.group_sender import SendOrder, SingleSender


class IpcSender:
    """A `WeightSender` whose servers read the weights out of a bucket of this process.

    Args:
        endpoints: the servers, in a session of `SGLangEngine.receiving` during `send`.
        name: tells this sender from others of the same servers.
        tensor_parallel: ranks of one server.
        device: ``cpu``, or ``cuda``: the current GPU, which the servers must see under the same number.
        timeout_s: seconds that one bucket may take to be loaded.
    """

    def __init__(
        self, endpoints: Sequence[Endpoint], name: str, tensor_parallel: int, device: str, timeout_s: float = 300.0
    ):
        self.name, self._tensor_parallel = name, tensor_parallel
        self._device = f"cuda:{torch.cuda.current_device()}" if device == "cuda" else device
        self._clients = [Client.at(endpoint, timeout_s) for endpoint in endpoints]

    def send(
        self,
        groups: Iterable[Sequence[NamedTensor]],
        bucket_bytes: int,
        *,
        version: str,
        order: SendOrder | None = None,
        flush_cache: bool = True,
    ) -> int:
        """Arguments, return value and failures as of `GroupSender.send`."""
        order, sent = order or SingleSender(), 0
        for bucket, last in fill_buckets(Bucket(bucket_bytes, self._device), groups):
            with order.turn(sent) as may_send:
                if not may_send:
                    raise NoRolloutCapacity(f"sender {self.name}: another sender of the same weights has failed")
                is_last = order.is_last(sent, last)
                sent += 1
                try:
                    asyncio.run(self._load(bucket, flush_cache and is_last, version if is_last else None))
                except NoRolloutCapacity as error:
                    held = f"{bucket.entries[0].name} .. {bucket.entries[-1].name}"
                    message = str(error).splitlines()[0][:300]
                    raise NoRolloutCapacity(f"sender {self.name}, bucket {sent} ({held}): {message}") from error
        if self._device != "cpu":
            del bucket
            torch.cuda.ipc_collect()  # what was shared is freed once nobody maps it
        return sent

    def leave(self) -> None:
        """Nothing to leave: a bucket whose sending failed is freed."""

    def close(self) -> None:
        """Nothing is held between two calls of `send`."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    async def _load(self, bucket: Bucket, flush_cache: bool, version: str | None) -> None:
        """Have all servers load the bucket. A server that replies has read it to the end.

        SGLang drops its tensors before it replies, and torch ends the GPU's work on mapped memory when it is dropped.
        """
        if self._device != "cpu":
            torch.cuda.synchronize()  # the bucket is filled
        calls = []
        for client in self._clients:
            handles = [bucket_handle(bucket) for _ in range(self._tensor_parallel)]
            calls.append(client.receive_shared(handles, flush_cache, version))
        await run_all(calls)


def bucket_handle(bucket: Bucket) -> bytes:
    """A handle with which one rank of a server reads the bucket once, as SGLang's ``flattened_bucket`` has it."""
    metadata, start = [], 0
    for entry in bucket.entries:
        end = start + entry.nbytes
        metadata.append(
            SimpleNamespace(
                name=entry.name,
                shape=torch.Size(entry.shape),
                dtype=entry.dtype,
                start_idx=start,
                end_idx=end,
                numel=entry.nbytes,
            )
        )
        start = end
    content = io.BytesIO()
    with _shared_by_name():
        ForkingPickler(content).dump({"flattened_tensor": bucket.content, "metadata": metadata})
    return content.getvalue()


@contextmanager
def _shared_by_name() -> Iterator[None]:
    """Shared memory of a CPU is found by its name: torch's default, a file descriptor, crashes a server that is not
    this process's own child."""
    before = multiprocessing.get_sharing_strategy()
    multiprocessing.set_sharing_strategy("file_system")
    try:
        yield
    finally:
        multiprocessing.set_sharing_strategy(before)
