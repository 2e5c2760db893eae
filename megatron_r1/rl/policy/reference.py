"""The reference policy, against which the KL penalty is computed: a copy of the trained policy's earlier weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Protocol

from torch import Tensor

from megatron_r1.model.chunks import Model
from megatron_r1.model.scores import head_weight
from megatron_r1.model.shards import Shard, part_of, shards

SAVED = "reference"
"""Kind of its tensors in a checkpoint."""


class FixedPolicy(Protocol):
    """A policy that updates leave alone: the reference policy, or a teacher."""

    @property
    def vocab_size(self) -> int | None:
        """Rows of its head that are the trained policy's too; None where all are."""
        ...

    def saved(self) -> Iterator[tuple[str, Shard]]:
        """Kind and shard, for a checkpoint, of what this rank owns."""
        ...

    def after_rollout(self, rollouts: int, sync_interval: int) -> None:
        """After so many rollouts: what the configured interval asks for."""
        ...

    def in_place(self) -> AbstractContextManager[Model]:
        """The model; inside this block it has this policy's weights."""
        ...

    def head(self) -> Tensor:
        """Inside `in_place`, on the last pipeline stage: this rank's rows of its head, [V, D]."""
        ...


class ReferencePolicy:
    """A copy of the weights at some step, balancing bias included, in host memory; swapped in when needed."""

    vocab_size = None

    def __init__(self, model: Model, weights: Mapping[str, Tensor] | None = None):
        """
        Args:
            weights: whole tensors by name, of a run that resumes; None takes the model's current weights.
        """
        self._model = model
        self.reset()
        if weights:
            for copy, shard in self._pairs():
                copy.copy_(part_of(weights, shard))

    def reset(self) -> None:
        """Copy the model's current weights."""
        self.copies = [shard.tensor.cpu().clone() for shard in shards(self._model)]

    def after_rollout(self, rollouts: int, sync_interval: int) -> None:
        """Copy the model's weights after every `sync_interval` rollouts; 0 never does."""
        if sync_interval and rollouts % sync_interval == 0:
            self.reset()

    def _pairs(self) -> Iterator[tuple[Tensor, Shard]]:
        """Each copy and its shard, looked up each time: an optimizer moves weights to other memory."""
        yield from zip(self.copies, shards(self._model), strict=True)

    def saved(self) -> Iterator[tuple[str, Shard]]:
        """Kind and shard, for a checkpoint, of what this rank owns."""
        for copy, shard in self._pairs():
            if shard.owned:
                yield SAVED, replace(shard, tensor=copy)

    def head(self) -> Tensor:
        """Inside `in_place`: this rank's rows of its head, [V, D]."""
        return head_weight(self._model).detach().clone()

    @contextmanager
    def in_place(self) -> Iterator[Model]:
        """The model; inside this block it has the reference's weights."""
        current = [shard.tensor.clone() for shard in shards(self._model)]
        for copy, shard in self._pairs():
            shard.tensor.copy_(copy)
        try:
            yield self._model
        finally:
            for weight, shard in zip(current, shards(self._model), strict=True):
                shard.tensor.copy_(weight)
