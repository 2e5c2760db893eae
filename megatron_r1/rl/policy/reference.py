"""The reference policy, towards which the penalty pulls."""

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
    """A copy of the weights at some step, balancing bias included: kept on the host, swapped in when needed."""

    def __init__(self, model: Model, weights: Mapping[str, Tensor] | None = None):
        """
        Args:
            weights: whole tensors by name, for a run that goes on; None takes the model's weights as they stand.
        """
        self._model = model
        self.reset()
        if weights:
            for copy, shard in self._beside():
                copy.copy_(part_of(weights, shard))

    def reset(self) -> None:
        """Take the model's weights as they stand."""
        self.copies = [shard.tensor.cpu().clone() for shard in shards(self._model)]

    def _beside(self) -> Iterator[tuple[Tensor, Shard]]:
        """Each copy and the shard that it is of, looked up anew: an optimizer moves weights to other memory."""
        yield from zip(self.copies, shards(self._model), strict=True)

    def saved(self) -> Iterator[tuple[str, Shard]]:
        """Kind and shard, for a checkpoint, of what this rank speaks for."""
        for copy, shard in self._beside():
            if shard.owned:
                yield SAVED, replace(shard, tensor=copy)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model computes with the reference's weights inside this block."""
        current = [shard.tensor.clone() for shard in shards(self._model)]
        for copy, shard in self._beside():
            shard.tensor.copy_(copy)
        try:
            yield
        finally:
            for weight, shard in zip(current, shards(self._model), strict=True):
                shard.tensor.copy_(weight)
