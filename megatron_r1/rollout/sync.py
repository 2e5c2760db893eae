"""How new weights reach the engine, stamped with a version: over a process group, or as a folder that it reads."""

from __future__ import annotations

import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from megatron_r1.config.model import ModelConfig
from megatron_r1.hf.config import serving_view
from megatron_r1.hf.export import export, hf_tensors
from megatron_r1.hf.gather import stage_leaders, whole_tensors
from megatron_r1.parallel import comm
from megatron_r1.rollout.engine import Engine

if TYPE_CHECKING:
    from megatron_r1.rollout.sglang.engine import SGLangEngine
    from megatron_r1.rollout.sglang.sender import Sender

_MEMORY = Path("/dev/shm")

NamedTensors = Callable[[], Iterable[tuple[str, Tensor]]]


class Sync(Protocol):
    """A way that weights take."""

    def push(self, version: str) -> None:
        """Make the engine sample from now on with the weights as they stand, which are called `version`."""
        ...


class GroupSync:
    """Sends the weights from memory to memory: one sender that holds them all, and the session around it."""

    def __init__(
        self, engine: SGLangEngine, sender: Sender, tensors: NamedTensors, model: ModelConfig, bucket_bytes: int
    ):
        """
        Args:
            engine: whose servers receive.
            sender: of this engine's endpoints.
            tensors: gives the weights as they stand, whole, by megatron-core name.
            model: shape of the model.
            bucket_bytes: bytes sent at a time.
        """
        self._engine, self._sender, self._tensors, self._model = engine, sender, tensors, model
        self._bucket_bytes = bucket_bytes
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
            weights = hf_tensors(self._tensors(), self._model, include_mtp=False)
            self._sender.send(weights, self._bucket_bytes, version=version)


class StageSync:
    """Sends the weights of a model that many ranks share: each pipeline stage its own part, one after the other.

    Tensor and expert shards are gathered to the stage's first rank, which sends over a group of its own; rank 0 holds
    the session. Every method is collective.
    """

    def __init__(
        self,
        engine: SGLangEngine | None,
        sender: Sender | None,
        module: torch.nn.Module,
        model: ModelConfig,
        bucket_bytes: int,
    ):
        """
        Args:
            engine: whose servers receive; None but on rank 0.
            sender: of the engine's endpoints; None but on each stage's first rank.
            module: this rank's part of the model.
            model: shape of the model.
            bucket_bytes: bytes sent at a time.
        """
        self._engine, self._sender, self._module, self._model = engine, sender, module, model
        self._bucket_bytes, self._leaders = bucket_bytes, stage_leaders()
        self._restarts = 0

    def push(self, version: str) -> None:
        """
        Raises:
            NoRolloutCapacity: a server failed; the engine refuses to answer until an update succeeds.
        """
        with self._engine.receiving(version) if self._engine else nullcontext():
            restarts = comm.broadcast(self._engine.restarts if self._engine else None)  # and the session is open
            if self._sender and restarts != self._restarts:
                self._sender.leave()  # a server that was started again is not in the group any more
            self._restarts = restarts
            for stage, leader in enumerate(self._leaders):
                whole = whole_tensors(self._module, to_rank=leader, stage=stage)
                if self._sender and comm.AllRanks().rank == leader:
                    weights = hf_tensors(whole, self._model, include_mtp=False, complete=False)
                    last = stage == len(self._leaders) - 1
                    self._sender.send(weights, self._bucket_bytes, last=last, version=version if last else None)
                else:
                    deque(whole, maxlen=0)
                comm.barrier()  # the next stage waits for its turn


class DiskSync:
    """Writes the weights as a folder that SGLang serves; two folders take turns, so that none is read half written.

    The folders live in memory where the system offers that, and are removed at `close`.
    """

    def __init__(self, tensors: NamedTensors, model: ModelConfig, tokenizer_folder: Path):
        """
        Args:
            tensors: gives the weights as they stand, whole, by megatron-core name.
            model: shape of the model.
            tokenizer_folder: names the special tokens.
        """
        self._tensors, self._model, self._tokenizer = tensors, model, tokenizer_folder
        place = _MEMORY if _MEMORY.is_dir() else None
        self._folder = Path(tempfile.mkdtemp(prefix="megatron_r1-weights-", dir=place))
        self._turn = 0
        self.engine: Engine | None = None
        """Who reads the folders; started on the first of them, so not known before."""

    def write(self) -> Path:
        """Export the weights as they stand; returns the folder to serve, without the multi-token layers."""
        self._turn = 1 - self._turn
        weights = self._folder / f"weights-{self._turn}"
        export(self._tensors(), self._model, weights, include_mtp=False, tokenizer_folder=self._tokenizer)
        return serving_view(weights, self._folder / f"view-{self._turn}")

    def push(self, version: str) -> None:
        """
        Raises:
            NoRolloutCapacity: a server failed.
            DataError: the weights are not those of the model.
        """
        assert self.engine is not None
        self.engine.update_weights(self.write(), version)

    def close(self) -> None:
        """Remove the folders."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> DiskSync:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
