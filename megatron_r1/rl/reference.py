"""The reference policy, towards which the penalty pulls."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from megatron_r1.model.build import load_native_tensors, native_tensors


class ReferencePolicy:
    """A copy of the weights at some step, balancing bias included: kept on the host, swapped in when needed."""

    def __init__(self, model: torch.nn.Module, weights: Mapping[str, Tensor] | None = None):
        """
        Args:
            weights: by megatron-core name, for a run that goes on; None takes the model's weights as they stand.
        """
        self._model = model
        self.weights = dict(weights) if weights else {}
        if not weights:
            self.reset()

    def reset(self) -> None:
        """Take the model's weights as they stand."""
        self.weights = {name: tensor.cpu().clone() for name, tensor in native_tensors(self._model)}

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model computes with the reference's weights inside this block."""
        current = {name: tensor.clone() for name, tensor in native_tensors(self._model)}
        load_native_tensors(self._model, self.weights)
        try:
            yield
        finally:
            load_native_tensors(self._model, current)
