"""Weights on their way to a server: many tensors end to end in one stretch of bytes.

How tensors are divided among buckets depends on names, types and shapes alone, and is decided in `Contents` and
`filled`: for tensors that are sent, and for a plan of what would be.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_r1.checkpoint.tensor_file import Entry
from megatron_r1.errors import DataError


@dataclass(frozen=True, slots=True)
class NamedTensor:
    """A tensor under its Hugging Face name."""

    name: str
    tensor: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes


class BucketLayout[AnyEntry: (Entry, NamedTensor)]:
    """What a bucket holds: tensors without gaps, each at a multiple of its element size.

    Args:
        capacity: bytes that the bucket holds; a unit that needs more gets a bucket for itself.
    """

    def __init__(self, capacity: int):
        self.capacity, self.nbytes = capacity, 0
        self.items: list[Entry] = []

    def description(self) -> dict[str, Any]:
        """Names, types and shapes as SGLang reads them."""
        return {
            "names": [item.name for item in self.items],
            "dtypes": [str(item.dtype).removeprefix("torch.") for item in self.items],
            "shapes": [list(item.shape) for item in self.items],
        }

    def fits(self, unit: Sequence[AnyEntry]) -> bool:
        """Whether the unit goes in behind what is there; SGLang knows no gaps between tensors."""
        end = self.nbytes
        for item in unit:
            if end % item.dtype.itemsize:
                return False
            end += item.nbytes
        return end <= self.capacity

    def add(self, unit: Sequence[AnyEntry]) -> None:
        """Take a unit in; an empty bucket takes one whatever its size."""
        for item in unit:
            self.items.append(Entry(item.name, item.dtype, item.shape))
            self.nbytes += item.nbytes

    def clear(self) -> None:
        """Hold nothing any more."""
        self.items, self.nbytes = [], 0


class Bucket(BucketLayout[NamedTensor]):
    """A bucket that holds the tensors themselves.

    Args:
        capacity: see `Contents`.
        device: where the buffer lies.
    """

    def __init__(self, capacity: int, device: str):
        super().__init__(capacity)
        self._device = device
        self._buffer = self._empty(capacity)

    @property
    def content(self) -> Tensor:
        """Shape (bytes used,), uint8."""
        return self._buffer[: self.nbytes]

    def add(self, unit: Sequence[NamedTensor]) -> None:
        """Copy a unit in; one that is larger than the bucket takes another buffer, for itself."""
        size, place = sum(item.nbytes for item in unit), self.nbytes
        if place + size > self._buffer.numel():
            del self._buffer
            self._buffer = self._empty(size)
        super().add(unit)
        for item in unit:
            target = self._buffer[place : place + item.nbytes]
            target.view(item.dtype).view(item.shape).copy_(item.tensor.detach())
            place += item.nbytes

    def clear(self) -> None:
        super().clear()
        if self._buffer.numel() > self.capacity:
            del self._buffer
            self._buffer = self._empty(self.capacity)

    def _empty(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self._device)


def filled[Filled: BucketLayout](bucket: Filled, units: Iterable[Sequence[Any]]) -> Iterator[tuple[Filled, bool]]:
    """Fill a bucket again and again; each time with whether it is the last.

    The same bucket is filled anew when the next one is asked for, and one unit is held beside it. A unit's tensors go
    in by falling element size, so that small elements do not leave larger ones between their multiples.

    Raises:
        DataError: there are no tensors.
    """
    for unit in units:
        unit = sorted(unit, key=lambda item: -item.dtype.itemsize)
        if bucket.items and not bucket.fits(unit):
            yield bucket, False
            bucket.clear()
        bucket.add(unit)
        del unit
    if not bucket.items:
        raise DataError("no weights to send")
    yield bucket, True


def planned(units: Iterable[Sequence[Entry]], capacity: int) -> list[list[Entry]]:
    """What the buckets will hold, for tensors of which only names, types and shapes are known."""
    return [bucket.items for bucket, _ in filled(BucketLayout[Entry](capacity), units)]
