"""The output layer, whose rows tensor-parallel ranks share, and the chunks in which tokens go through it.

Shapes: D width, V this rank's rows of the head, K targets of a token, C tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

CHUNK_LOGITS = 2**24
"""Logits of a chunk on this rank by default: 64 MiB in fp32, and all that a small vocabulary needs in one go."""


@dataclass(frozen=True)
class Head:
    """An output layer whose rows tensor-parallel ranks share out in order, each as many."""

    weight_VD: Tensor
    group: dist.ProcessGroup
    vocab_size: int | None = None
    """Tokens of the vocabulary; rows of the head beyond them are padding and get no probability. None: all rows."""

    @property
    def vocab_start(self) -> int:
        """Token id of this rank's first row."""
        return dist.get_rank(self.group) * self.weight_VD.shape[0]

    @property
    def local_vocab_size(self) -> int:
        """This rank's rows that are tokens of the vocabulary, not padding."""
        held = self.weight_VD.shape[0]
        return held if self.vocab_size is None else min(max(self.vocab_size - self.vocab_start, 0), held)

    @property
    def global_vocab_size(self) -> int:
        """Tokens of the vocabulary over all ranks."""
        return self.weight_VD.shape[0] * dist.get_world_size(self.group) if self.vocab_size is None else self.vocab_size


class ChunkPlan(NamedTuple):
    """How many tokens go through the head at once, and what ranks exchange of each chunk."""

    head: Head
    temperature: float
    chunk_tokens: int

    def chunks(self, tokens: int) -> Iterator[slice]:
        for start in range(0, tokens, self.chunk_tokens):
            yield slice(start, min(start + self.chunk_tokens, tokens))

    def logits(self, hidden_CD: Tensor, weight_VD: Tensor) -> Tensor:
        """Logits [C, V] of the tokens of the vocabulary that this rank holds, in a buffer of their own."""
        logits_CV = hidden_CD @ weight_VD[: self.head.local_vocab_size].t()
        if logits_CV.dtype != torch.float64:
            logits_CV = logits_CV.float()
        return logits_CV if self.temperature == 1.0 else logits_CV.div_(self.temperature)

    def reduce(self, values: Tensor, operation: Any = dist.ReduceOp.SUM) -> Tensor:
        """Collective: the values reduced over the group's ranks, in place."""
        dist.all_reduce(values, operation, self.head.group)
        return values

    def gather(self, values_CK: Tensor) -> Tensor:
        """Every rank's, in the order of ranks: [C, ranks x K]."""
        parts = [torch.empty_like(values_CK) for _ in range(dist.get_world_size(self.head.group))]
        dist.all_gather(parts, values_CK.contiguous(), self.head.group)
        return torch.cat(parts, 1)

    def mine(self, targets_CK: Tensor) -> tuple[Tensor, Tensor]:
        """Which targets this rank holds, and at which of its rows; row 0 for those of other ranks."""
        local_CK = targets_CK - self.head.vocab_start
        mine_CK = (local_CK >= 0) & (local_CK < self.head.local_vocab_size)
        return local_CK.where(mine_CK, 0), mine_CK


def chunk_plan(head: Head, temperature: float, chunk_logits: int) -> ChunkPlan:
    """The plan by which at most `chunk_logits` logits exist at once.

    Raises:
        ValueError: the temperature or the vocabulary size is out of range.
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: must be above 0")
    rows = head.weight_VD.shape[0] * dist.get_world_size(head.group)
    if head.vocab_size is not None and not 0 < head.vocab_size <= rows:
        raise ValueError(f"vocab_size={head.vocab_size}: must be at least 1 and at most the {rows} rows of the head")
    return ChunkPlan(head, temperature, max(1, chunk_logits // max(1, head.weight_VD.shape[0])))
