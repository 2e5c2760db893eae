"""How new weights reach the engine, stamped with a version: in memory, or as a folder that it reads.

Strategies of one protocol: `GroupSync` sends from a rank that can see all weights, `StageSync` from a model that many
ranks share, `DiskSync` by way of a folder. The first two send over a process group (`Sender`) or through memory that
trainer and servers share (`SharedSender`). Nowhere is there a second copy of the model: beside the weights themselves a
sending rank holds one bucket and what is put together for the next one.
"""

from __future__ import annotations

import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from megatron_r1.config.model import ModelConfig
from megatron_r1.errors import NoRolloutCapacity, UserError
from megatron_r1.hf.config import generation_config, serving_view, special_tokens
from megatron_r1.hf.export import write_folder
from megatron_r1.hf.gather import ShardDirectory, assemble, shard_directory
from megatron_r1.model.shards import shards
from megatron_r1.parallel.comm import all_gather_object
from megatron_r1.parallel.launcher import rank
from megatron_r1.parallel.mesh import pipeline_stage
from megatron_r1.rollout.sync.buckets import NamedTensor, planned
from megatron_r1.rollout.sync.payload import WeightPayload
from megatron_r1.rollout.sync.send_order import RoundRobin, SendOrder

_MEMORY = Path("/dev/shm")

ReadWeights = Callable[[], Iterable[tuple[str, Tensor]]]


class WeightSync(Protocol):
    """A way that weights take."""

    def push(self, version: str) -> None:
        """Make the engine sample from now on with the weights as they stand, which are called `version`."""
        ...


class WeightReceiver(Protocol):
    """An engine whose servers can be sent weights."""

    @property
    def restarts(self) -> int:
        """Times that a server was started again, which takes it out of every group."""
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
    """A way to bring buckets of weights to an engine's servers: `Sender` or `SharedSender`."""

    def send(
        self,
        units: Iterable[Sequence[NamedTensor]],
        bucket_bytes: int,
        *,
        version: str,
        turns: SendOrder | None = None,
        flush_cache: bool = True,
    ) -> int:
        """See `Sender.send`."""
        ...

    def leave(self) -> None:
        """Forget the servers as they were; the next send finds them anew."""
        ...


class GroupSync:
    """Sends the weights from memory to memory: one sender that sees them all, and the session around it."""

    def __init__(
        self,
        engine: WeightReceiver,
        sender: WeightSender,
        tensors: ReadWeights,
        outgoing: WeightPayload,
        bucket_bytes: int,
        flush_cache: bool = True,
    ):
        """
        Args:
            engine: whose servers receive.
            sender: of this engine's endpoints.
            tensors: gives the weights as they stand, whole, by megatron-core name.
            outgoing: what of them is sent.
            bucket_bytes: bytes sent at a time.
            flush_cache: whether the servers drop the cache of the old weights, as the engine's pause says.
        """
        self._engine, self._sender, self._tensors, self._outgoing = engine, sender, tensors, outgoing
        self._bucket_bytes, self._flush_cache = bucket_bytes, flush_cache
        self._restarts = 0

    def push(self, version: str) -> None:
        """
        Raises:
            NoRolloutCapacity: a server failed; the engine refuses to answer until an update succeeds.
            DataError: the weights are not those of the model; likewise.
        """
        with self._engine.receiving(version):
            if self._engine.restarts != self._restarts:
                self._sender.leave()  # a server that was started again is not in the group any more
            self._restarts = self._engine.restarts
            tensors = self._outgoing.tensors(self._tensors(), complete=True)
            units = self._outgoing.together(self._outgoing.names()).of(tensors)
            self._sender.send(units, self._bucket_bytes, version=version, flush_cache=self._flush_cache)


class StageSync:
    """Sends the weights of a model that many ranks share: each pipeline stage its own part, in turns with the others.

    Tensor and expert shards are gathered to the stage's first rank, which sends over a group of its own. While one
    stage sends, the others gather and pack what they send next. Rank 0 holds the session. Every method is collective,
    and when a rank fails all ranks raise.
    """

    def __init__(
        self,
        engine: WeightReceiver | None,
        sender: WeightSender | None,
        module: torch.nn.Module,
        outgoing: WeightPayload,
        bucket_bytes: int,
        flush_cache: bool = True,
    ):
        """
        Args:
            engine: whose servers receive; None but on rank 0.
            sender: of the engine's endpoints; None but on each stage's first rank.
            module: this rank's part of the model.
            outgoing: what of the model is sent.
            bucket_bytes: bytes sent at a time.
            flush_cache: whether the servers drop the cache of the old weights, as the engine's pause says.
        """
        self._engine, self._sender, self._module, self._outgoing = engine, sender, module, outgoing
        self._bucket_bytes, self._flush_cache = bucket_bytes, flush_cache
        self._rank = rank()
        stages = all_gather_object(pipeline_stage())
        everything = shard_directory([shard for shard in shards(module) if shard.owned])
        self._parts = parts_of_stages(everything, stages, outgoing)
        """By stage, what its ranks hold of what is sent."""
        self._stage = pipeline_stage()
        self._leaders = [stages.index(stage) for stage in range(len(self._parts))]
        self._buckets = [len(planned(outgoing.units(part), bucket_bytes)) for part in self._parts]
        self._restarts = 0

    def push(self, version: str) -> None:
        """
        Raises:
            NoRolloutCapacity: a server or another rank failed; the engine refuses to answer until an update succeeds.
            DataError: the weights are not those of the model; likewise.
        """
        with ExitStack() as session:
            if self._engine:
                receiving = self._engine.receiving(version)
                _on_all_ranks(lambda: session.enter_context(receiving))
            else:
                _on_all_ranks(lambda: None)
            restarts = all_gather_object(self._engine.restarts if self._engine else 0)[0]
            if self._sender and restarts != self._restarts:
                self._sender.leave()  # a server that was started again is not in the group any more
            self._restarts = restarts
            _on_all_ranks(lambda: self._send(version))
            _on_all_ranks(session.close)

    def _send(self, version: str) -> None:
        part, leader = self._parts[self._stage], self._leaders[self._stage]
        owned = [shard for shard in shards(self._module) if shard.owned and shard.name in part]
        whole = assemble(part, owned, next(self._module.parameters()).device, leader)
        if self._rank != leader:
            deque(whole, maxlen=0)
            return
        assert self._sender is not None
        turns = RoundRobin(self._leaders, self._buckets, self._rank)
        try:
            units = self._outgoing.together(part).of(self._outgoing.tensors(whole, complete=False))
            sent = self._sender.send(
                units, self._bucket_bytes, version=version, turns=turns, flush_cache=self._flush_cache
            )
            assert sent == turns.buckets, f"{sent} buckets went where {turns.buckets} were planned"
        finally:
            deque(whole, maxlen=0)  # the ranks that send their parts are not left waiting after a failure
            turns.abandon()


def parts_of_stages(everything: ShardDirectory, stages: list[int], outgoing: WeightPayload) -> list[ShardDirectory]:
    """What is sent of each pipeline stage's tensors.

    Args:
        everything: all ranks' shards.
        stages: each rank's pipeline stage.
        outgoing: what is sent.
    """
    sent = set(outgoing.names())
    parts: list[ShardDirectory] = [{} for _ in range(max(stages) + 1)]
    for name, (shape, held) in everything.items():
        if name in sent:
            parts[stages[held[0].rank]][name] = (shape, held)
    return parts


def _on_all_ranks(action: Callable[[], object]) -> None:
    """Collective: do something on every rank; when it fails on one that is known to be its fault, all ranks raise."""
    error: UserError | None = None
    try:
        action()
    except UserError as raised:
        error = raised
    told = all_gather_object(str(error) if error else "")
    if error:
        raise error
    for failed, message in enumerate(told):
        if message:
            raise NoRolloutCapacity(f"rank {failed}: {message}")


class DiskSync:
    """Writes the weights as a folder that SGLang serves; two folders take turns, so that none is read half written.

    The folder holds, bit for bit, what a `GroupSync` of the same `Outgoing` sends. The folders live in memory where the
    system offers that, and are removed at `close`.
    """

    def __init__(
        self, tensors: ReadWeights, model: ModelConfig, tokenizer_folder: Path, outgoing: WeightPayload | None = None
    ):
        """
        Args:
            tensors: gives the weights as they stand, whole, by megatron-core name.
            model: shape of the model.
            tokenizer_folder: names the special tokens.
            outgoing: what is written, and in which formats; by default all but the multi-token layers.
        """
        self._tensors, self._outgoing, self._tokenizer = tensors, outgoing or WeightPayload(model), tokenizer_folder
        place = _MEMORY if _MEMORY.is_dir() else None
        self._folder = Path(tempfile.mkdtemp(prefix="megatron_r1-weights-", dir=place))
        self._turn = 0
        self.engine: FolderReader | None = None
        """Who reads the folders; started on the first of them, so not known before."""

    def write(self) -> Path:
        """Export the weights as they stand; returns the folder to serve."""
        self._turn = 1 - self._turn
        weights = self._folder / f"weights-{self._turn}"
        named = ((one.name, one.tensor) for one in self._outgoing.tensors(self._tensors(), complete=True))
        tokens = special_tokens(self._tokenizer)
        write_folder(named, weights, self._outgoing.config(tokens), generation_config(tokens), self._tokenizer)
        return serving_view(weights, self._folder / f"view-{self._turn}")

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
