"""Weights on their way to a server: many tensors end to end in one stretch of bytes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from megatron_r1.errors import DataError

NamedTensor = tuple[str, Tensor]

LATENT_DOWN = re.compile(r"(.*\.self_attn\.)(q_a_proj|q_proj|kv_a_proj_with_mqa)\.weight")
"""SGLang fuses the two down-projections of a layer, of query and of keys and values, when both come in one load."""


class Bucket:
    """Tensors end to end in one buffer, each at a multiple of its element size.

    Args:
        capacity: bytes that the bucket holds; tensors that need more get it for themselves, with a larger buffer.
        device: where the buffer lies.
    """

    def __init__(self, capacity: int, device: str):
        self._capacity = capacity
        self._buffer = torch.empty(capacity, dtype=torch.uint8, device=device)
        self._used = 0
        self.names: list[str] = []
        self._tensors: list[tuple[str, list[int]]] = []

    @property
    def content(self) -> Tensor:
        """Shape (bytes used,), uint8."""
        return self._buffer[: self._used]

    def description(self) -> dict[str, Any]:
        """Names, types and shapes as SGLang reads them."""
        return {
            "names": self.names,
            "dtypes": [dtype for dtype, _ in self._tensors],
            "shapes": [shape for _, shape in self._tensors],
        }

    def fits(self, tensors: list[NamedTensor]) -> bool:
        """Whether the tensors go in behind what is there; SGLang knows no gaps between tensors."""
        size = sum(tensor.nbytes for _, tensor in tensors)
        aligned = all(self._used % tensor.element_size() == 0 for _, tensor in tensors)
        return aligned and self._used + size <= self._capacity

    def add(self, tensors: list[NamedTensor]) -> None:
        """Copy tensors in; an empty bucket takes them whatever their size."""
        size = sum(tensor.nbytes for _, tensor in tensors)
        if self._used + size > self._buffer.numel():
            self._buffer = torch.empty(size, dtype=torch.uint8, device=self._buffer.device)
        for name, tensor in tensors:
            place = self._buffer[self._used : self._used + tensor.nbytes]
            place.view(tensor.dtype).view(tensor.shape).copy_(tensor.detach())
            self._used += tensor.nbytes
            self.names.append(name)
            self._tensors.append((str(tensor.dtype).removeprefix("torch."), list(tensor.shape)))

    def clear(self) -> None:
        self._used = 0
        self.names, self._tensors = [], []


def buckets(tensors: Iterable[NamedTensor], capacity: int, device: str) -> Iterator[tuple[Bucket, bool]]:
    """Fill a bucket again and again; each time with whether it is the last.

    The same bucket is filled anew when the next one is asked for. One tensor (or pair, see `together`) is held beside
    it; one that is larger than `capacity` makes a bucket of its own.

    Raises:
        DataError: there are no tensors, or half of a pair.
    """
    bucket = Bucket(capacity, device)
    for unit in together(tensors):
        if bucket.names and not bucket.fits(unit):
            yield bucket, False
            bucket.clear()
        bucket.add(unit)
    if not bucket.names:
        raise DataError("no weights to send")
    yield bucket, True


def together(tensors: Iterable[NamedTensor]) -> Iterator[list[NamedTensor]]:
    """The tensors one by one, but a layer's two down-projections as a pair, when the second of them comes.

    Where a layer projects its query directly, nothing is fused: the query shows that its partner may come alone.
    """
    waiting: dict[str, NamedTensor] = {}
    direct: set[str] = set()
    for name, tensor in tensors:
        match = LATENT_DOWN.fullmatch(name)
        if not match:
            yield [(name, tensor)]
        elif (layer := match[1]) in waiting:
            yield [waiting.pop(layer), (name, tensor)]
        elif match[2] == "q_proj" or layer in direct:
            direct.add(layer)
            yield [(name, tensor)]
        else:
            waiting[layer] = (name, tensor)
    if waiting:
        (name, _), *_ = waiting.values()
        raise DataError(f"{name}: the projection that is loaded together with it did not come")
