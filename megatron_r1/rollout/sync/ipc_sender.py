"""Gives weights to SGLang servers on this machine through memory that both map, rather than by sending them.

What travels is a handle of a bucket: on CUDA one of CUDA IPC, so that a server reads the trainer's memory on the same
GPU, or over NVLink on another one; on a CPU the name of a file in shared memory. Bytes are copied twice, into the
bucket and out of it, and beside the weights of both sides one bucket of memory is held, while weights are sent.

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
from megatron_r1.rollout.sglang.client import Client, Endpoint
from megatron_r1.rollout.sync.buckets import Bucket, NamedTensor, filled
from megatron_r1.rollout.sync.send_order import SendOrder, SingleSender


class IpcSender:
    """Has servers of this machine read weights out of a bucket; in place of a `Sender`.

    Args:
        endpoints: the servers, in a session of `SGLangEngine.receiving` while something is sent.
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
        units: Iterable[Sequence[NamedTensor]],
        bucket_bytes: int,
        *,
        version: str,
        turns: SendOrder | None = None,
        flush_cache: bool = True,
    ) -> int:
        """Arguments, return value and failures as of `Sender.send`."""
        turns, sent = turns or SingleSender(), 0
        for bucket, last in filled(Bucket(bucket_bytes, self._device), units):
            if not turns.take(sent):
                raise NoRolloutCapacity(f"sender {self.name}: another sender of the same weights has failed")
            ends = turns.ends(sent, last)
            sent += 1
            try:
                asyncio.run(self._load(bucket, flush_cache and ends, version if ends else None))
            except NoRolloutCapacity as error:
                held = f"{bucket.items[0].name} .. {bucket.items[-1].name}"
                message = str(error).splitlines()[0][:300]
                raise NoRolloutCapacity(f"sender {self.name}, bucket {sent} ({held}): {message}") from error
            turns.give(sent - 1, True)
        if self._device != "cpu":
            del bucket
            torch.cuda.ipc_collect()  # what was shared is freed once nobody maps it
        return sent

    def leave(self) -> None:
        """Nothing to leave: what a failure interrupts is forgotten with its bucket."""

    def close(self) -> None:
        """Nothing is held between two sends."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    async def _load(self, bucket: Bucket, flush_cache: bool, version: str | None) -> None:
        """Have all servers load the bucket. A server that answers has read it to the end.

        SGLang drops its tensors before it answers, and torch ends the GPU's work on mapped memory when it is dropped.
        """
        if self._device != "cpu":
            torch.cuda.synchronize()  # the bucket is filled
        calls = [
            asyncio.ensure_future(
                client.receive_shared([handle(bucket) for _ in range(self._tensor_parallel)], flush_cache, version)
            )
            for client in self._clients
        ]
        try:
            await asyncio.gather(*calls)
        finally:
            for call in calls:
                call.cancel()


def handle(bucket: Bucket) -> bytes:
    """What a rank of a server needs to read the bucket, as SGLang's ``flattened_bucket`` has it; to be used once."""
    described, start = [], 0
    for item in bucket.items:
        end = start + item.nbytes
        described.append(
            SimpleNamespace(
                name=item.name,
                shape=torch.Size(item.shape),
                dtype=item.dtype,
                start_idx=start,
                end_idx=end,
                numel=item.nbytes,
            )
        )
        start = end
    content = io.BytesIO()
    with _by_name():
        ForkingPickler(content).dump({"flattened_tensor": bucket.content, "metadata": described})
    return content.getvalue()


@contextmanager
def _by_name() -> Iterator[None]:
    """Shared memory of a CPU is found by its name. Torch's default, a file descriptor, ends a server that is no child
    of this process's own making."""
    before = multiprocessing.get_sharing_strategy()
    multiprocessing.set_sharing_strategy("file_system")
    try:
        yield
    finally:
        multiprocessing.set_sharing_strategy(before)
