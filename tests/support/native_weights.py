"""One rank's weights by megatron-core's names, put into a model."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from megatron_r1.model.build import native_tensors
from megatron_r1.model.chunks import Model


def load_native_tensors(model: Model, tensors: Mapping[str, Tensor]) -> None:
    """Copy weights into the model by name.

    Raises:
        ValueError: a tensor is missing or left over.
    """
    wanted = dict(native_tensors(model))
    if different := wanted.keys() ^ tensors.keys():
        raise ValueError(f"{min(different)}: is not on both sides")
    for name, tensor in wanted.items():
        tensor.copy_(tensors[name])
