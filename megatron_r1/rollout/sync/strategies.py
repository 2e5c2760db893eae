"""How the trainer's new weights reach the engine, stamped with a version: from memory to memory, or through a folder.

Strategies of one protocol, `WeightSync`: `GroupSync` sends from a process that can read all weights, `StageSync` from a
model that many ranks share, `DiskSync` through a folder (`GatherOnlySync` on the other ranks). The first two send over
a process group (`GroupSender`) or through memory that trainer and servers share (`IpcSender`). None of them makes a
second copy of the model: beside the weights themselves a sending rank holds one bucket and the tensors of the next one.
Deltas alone do (delta.py): a sender holds what it sent.
"""

from __future__ import annotations

import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from megatron_r1.config.model import ModelConfig
from megatron_r1.errors import NoRolloutCapacity, UserError
from megatron_r1.hf.config import generation_config, serving_view, special_tokens
from megatron_r1.hf.export import write_folder
from megatron_r1.model.shards import ShardDirectory, assemble, shard_directory, shards, whole_tensors
from megatron_r1.parallel.comm import all_gather_object
from megatron_r1.parallel.mesh import pipeline_stage
from megatron_r1.platform.launcher import rank
from megatron_r1.platform.shared_memory import make_folder
from megatron_r1.rollout.sync.buckets import NamedTensor, plan_buckets
from megatron_r1.rollout.sync.group_sender import RoundRobin, SendOrder
from megatron_r1.rollout.sync.payload import WeightPayload

ReadWeights = Callable[[], Iterable[tuple[str, Tensor]]]
"""Gives the current weights, whole, by megatron-core name."""


class WeightReceiver(Protocol):
    """An engine whose servers can be sent weights."""

    @property
    def restarts(self) -> int:
        """Restarts of servers, each of which takes the server out of every process group."""
        ...

    def receiving(self, version: str) -> AbstractContextManager[None]:
        """The session in which its servers receive; at the end of the block all of them must serve `version`."""
        ...


class FolderReader(Protocol):
    """An engine whose servers load weights from a folder."""

    def load_weights(self, folder: Path, version: str) -> None:
        """Load the weights of `folder` into all servers."""
        ...


class WeightSender(Protocol):
    """Sends buckets of weights to an engine's servers: `GroupSender` or `IpcSender`."""

    def send(
        self,
        groups: Iterable[Sequence[NamedTensor]],
        bucket_bytes: int,
        *,
        version: str,
        order: SendOrder | None = None,
        flush_cache: bool = True,
    ) -> int:
        """See `GroupSender.send`."""
        ...

    def leave(self) -> None:
        """Forget the servers' connections; the next send makes new ones."""
        ...


class GroupSync:
    """Sends the weights from memory to memory: one sender that reads them all, and the session around it."""

    def __init__(
        self,
        engine: WeightReceiver,
        sender: WeightSender,
        weights: ReadWeights,
        payload: WeightPayload,
        bucket_bytes: int,
        flush_cache: bool = True,
    ):
        """
        Args:
            engine: whose servers receive.
            sender: to this engine's endpoints.
            weights: reads the current weights.
            payload: which of them are sent, and in which formats.
            bucket_bytes: bytes sent at a time.
            flush_cache: whether the servers drop the cache of the old weights, as the engine's pause says.
        """
        self._engine, self._sender, self._weights, self._payload = engine, sender, weights, payload
        self._bucket_bytes, self._flush_cache = bucket_bytes, flush_cache
        self._restarts = 0

    def push(self, version: str) -> None:
        """
        Raises:
            NoRolloutCapacity: a server failed; the engine refuses to generate until an update succeeds.
            DataError: the weights are not those of the model; likewise.
        """
        with self._engine.receiving(version):
            if self._engine.restarts != self._restarts:
                self._sender.leave()  # a restarted server is not in the group any more
            self._restarts = self._engine.restarts
            groups = self._payload.groups(self._weights())
            self._sender.send(groups, self._bucket_bytes, version=version, flush_cache=self._flush_cache)


class StageSync:
    """Sends the weights of a model that many ranks share: each pipeline stage its own part, bucket by bucket in turn.

    Tensor and expert shards are gathered to the stage's first rank, which sends over a group of its own. While one
    stage sends, the others gather and pack what they send next. Rank 0 holds the session. Every method is collective,
    and when a rank fails all ranks raise.
    """

    def __init__(
        self,
        engine: WeightReceiver | None,
        sender: WeightSender | None,
        module: torch.nn.Module,
        payload: WeightPayload,
        bucket_bytes: int,
        flush_cache: bool = True,
    ):
        """
        Args:
            engine: whose servers receive; None but on rank 0.
            sender: to the engine's endpoints; None but on each stage's first rank.
            module: this rank's part of the model.
            payload: which weights are sent, and in which formats.
            bucket_bytes: bytes sent at a time.
            flush_cache: whether the servers drop the cache of the old weights, as the engine's pause says.
        """
        self._engine, self._sender, self._module, self._payload = engine, sender, module, payload
        self._bucket_bytes, self._flush_cache = bucket_bytes, flush_cache
        self._rank, self._stage = rank(), pipeline_stage()
        stages = all_gather_object(self._stage)
        everything = shard_directory([shard for shard in shards(module) if shard.owned])
        self._parts = parts_of_stages(everything, stages, payload)
        """By stage, the shards of the weights that it sends."""
        self._leaders = [stages.index(stage) for stage in range(len(self._parts))]
        self._buckets = [len(plan_buckets(payload.planned_groups(part), bucket_bytes)) for part in self._parts]
        self._restarts = 0

    def push(self, version: str) -> None:
        """
        Raises:
            NoRolloutCapacity: a server or another rank failed; the engine refuses to generate until an update succeeds.
            DataError: the weights are not those of the model; likewise.
        """
        with ExitStack() as session:
            with fail_together():
                if self._engine:
                    session.enter_context(self._engine.receiving(version))
            restarts = all_gather_object(self._engine.restarts if self._engine else 0)[0]
            if self._sender and restarts != self._restarts:
                self._sender.leave()  # a restarted server is not in the group any more
            self._restarts = restarts
            with fail_together():
                self._send(version)
            with fail_together():
                session.close()

    def _send(self, version: str) -> None:
        part, leader = self._parts[self._stage], self._leaders[self._stage]
        owned = [shard for shard in shards(self._module) if shard.owned and shard.name in part]
        whole = assemble(part, owned, next(self._module.parameters()).device, leader)
        if self._rank != leader:
            deque(whole, maxlen=0)
            return
        assert self._sender is not None
        order = RoundRobin(self._leaders, self._buckets, self._rank)
        try:
            groups = self._payload.groups(whole, part)
            sent = self._sender.send(
                groups, self._bucket_bytes, version=version, order=order, flush_cache=self._flush_cache
            )
            assert sent == order.buckets, f"{sent} buckets were sent where {order.buckets} were planned"
        finally:
            deque(whole, maxlen=0)  # after a failure the ranks that send their shards are not left waiting
            order.abandon()


def parts_of_stages(everything: ShardDirectory, stages: list[int], payload: WeightPayload) -> list[ShardDirectory]:
    """By pipeline stage, the shards of the weights that it sends.

    Args:
        everything: all ranks' shards.
        stages: each rank's pipeline stage.
        payload: which weights are sent.
    """
    sent = set(payload.names())
    parts: list[ShardDirectory] = [{} for _ in range(max(stages) + 1)]
    for name, (shape, held) in everything.items():
        if name in sent:
            parts[stages[held[0].rank]][name] = (shape, held)
    return parts


@contextmanager
def fail_together() -> Iterator[None]:
    """Collective: when the block raises a UserError on one rank, all ranks raise."""
    error: UserError | None = None
    try:
        yield
    except UserError as raised:
        error = raised
    messages = all_gather_object(str(error) if error else "")
    if error:
        raise error
    for other, message in enumerate(messages):
        if message:
            raise NoRolloutCapacity(f"rank {other}: {message}")


class DiskSync:
    """Writes the weights as a folder that SGLang serves; two folders alternate, so that none is read half written.

    The folder holds, bit for bit, what a `GroupSync` of the same payload sends. The folders are in /dev/shm where the
    system has it, and are removed at `close`.
    """

    def __init__(
        self, weights: ReadWeights, model: ModelConfig, tokenizer_folder: Path, payload: WeightPayload | None = None
    ):
        """
        Args:
            weights: reads the current weights.
            model: shape of the model.
            tokenizer_folder: names the special tokens.
            payload: what is written, and in which formats; by default all but the multi-token prediction layers.
        """
        self._weights, self._payload, self._tokenizer = weights, payload or WeightPayload(model), tokenizer_folder
        self._folder = make_folder("weights")
        self._current = 0
        self.engine: FolderReader | None = None
        """Reads the folders."""

    def write(self) -> Path:
        """Export the current weights; returns the folder to serve."""
        self._current = 1 - self._current
        folder = self._folder / f"weights-{self._current}"
        named = ((one.name, one.tensor) for one in self._payload.tensors(self._weights(), complete=True))
        tokens = special_tokens(self._tokenizer)
        write_folder(named, folder, self._payload.config(tokens), generation_config(tokens), self._tokenizer)
        return serving_view(folder, self._folder / f"view-{self._current}")

    def push(self, version: str) -> None:
        """
        Raises:
            NoRolloutCapacity: a server failed.
            DataError: the weights are not those of the model.
        """
        assert self.engine is not None
        self.engine.load_weights(self.write(), version)

    def close(self) -> None:
        """Remove the folders."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> DiskSync:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class GatherOnlySync:
    """The other ranks' side of a `DiskSync` of rank 0: they give their part of the weights."""

    def __init__(self, module: torch.nn.Module):
        self._module = module

    def push(self, version: str) -> None:
        """Take part in gathering the weights."""
        deque(whole_tensors(self._module), maxlen=0)
