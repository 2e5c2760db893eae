"""The reference policy of the KL penalty."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

from torch import Tensor

from megatron_r1.model.chunks import Model
from megatron_r1.model.shards import Shard, part_of, shards

SAVED = "reference"
"""Kind of its tensors in a checkpoint."""


class ReferencePolicy:
    """A copy of the weights at some step, balancing bias included, in host memory; swapped in when needed."""

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

    def _pairs(self) -> Iterator[tuple[Tensor, Shard]]:
        """Each copy and its shard, looked up each time: an optimizer moves weights to other memory."""
        yield from zip(self.copies, shards(self._model), strict=True)

    def saved(self) -> Iterator[tuple[str, Shard]]:
        """Kind and shard, for a checkpoint, of what this rank owns."""
        for copy, shard in self._pairs():
            if shard.owned:
                yield SAVED, replace(shard, tensor=copy)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside this block the model has the reference's weights."""
        current = [shard.tensor.clone() for shard in shards(self._model)]
        for copy, shard in self._pairs():
            shard.tensor.copy_(copy)
        try:
            yield
        finally:
            for weight, shard in zip(current, shards(self._model), strict=True):
                shard.tensor.copy_(weight)
