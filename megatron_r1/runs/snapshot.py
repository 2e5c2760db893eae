"""A copy of a rank's state for a checkpoint, so that the state can be written while training continues."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from megatron_r1.checkpoint.manifest import FileRecord
from megatron_r1.checkpoint.sharded import TensorPart, write_parts
from megatron_r1.checkpoint.tensors import write_state, write_tensors
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.model.shards import Shard
from megatron_r1.train.state import TrainState


@dataclass
class Snapshot:
    """One rank's part of a checkpoint."""

    rank: int
    parts: dict[str, list[TensorPart]] = field(default_factory=dict)
    """Parts of whole tensors, by kind."""
    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """Tensors of this rank alone, by kind."""

    def add(self, shards: Iterable[tuple[str, Shard]], copy: bool) -> None:
        """Add shards by kind, in host memory.

        Args:
            copy: copy tensors even if they are in host memory already, so that later changes do not affect them.
        """
        for kind, shard in shards:
            tensor = shard.tensor.detach()
            tensor = tensor.to("cpu", copy=True) if copy else tensor.cpu()
            self.parts.setdefault(kind, []).append(TensorPart(shard.name, shard.whole_shape, shard.offset, tensor))

    def write(self, folder: Path) -> dict[str, FileRecord]:
        """Write all tensors; returns the files with their hashes."""
        records: dict[str, FileRecord] = {}
        for kind, parts in self.parts.items():
            records |= write_parts(folder, kind, self.rank, parts)
        for kind, tensors in self.tensors.items():
            records |= write_tensors(folder, kind, self.rank, tensors.items())
        return records


@dataclass
class RankZeroSnapshot(Snapshot):
    """The snapshot of rank 0, which also contains the state common to all ranks."""

    state: TrainState = field(default_factory=TrainState)
    tokenizer: Tokenizer | None = None

    def write(self, folder: Path) -> dict[str, FileRecord]:
        records = super().write(folder)
        write_state(folder, self.state.as_dict())
        if self.tokenizer:
            self.tokenizer.save(folder / "tokenizer")
        return records


def random_state() -> dict[str, Tensor]:
    """State of this rank's random generator."""
    return {"cpu": torch.get_rng_state()}
