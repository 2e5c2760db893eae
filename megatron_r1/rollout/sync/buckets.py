"""Packs weights into buckets: many tensors end to end in one stretch of bytes, or side by side where they are.

How tensors are divided among buckets depends on names, types and shapes alone: `BucketLayout` and `fill_buckets` decide
it for tensors that are sent, and for the plan of a sync (`plan_buckets`).
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
    """Which tensors a bucket holds: without gaps, each at a multiple of its element size.

    Args:
        capacity: bytes that the bucket holds; a fused group that needs more gets a bucket for itself.
    """

    def __init__(self, capacity: int):
        self.capacity, self.nbytes = capacity, 0
        self.entries: list[Entry] = []

    load_format: str | None = "flattened_bucket"
    """How SGLang receives it: one tensor of bytes, or (None) its tensors one by one."""

    def description(self) -> dict[str, Any]:
        """Format, names, types and shapes as SGLang reads them."""
        return {
            "load_format": self.load_format,
            "names": [entry.name for entry in self.entries],
            "dtypes": [str(entry.dtype).removeprefix("torch.") for entry in self.entries],
            "shapes": [list(entry.shape) for entry in self.entries],
        }

    def fits(self, group: Sequence[AnyEntry]) -> bool:
        """Whether the group goes in after what is there; SGLang knows no gaps between tensors."""
        end = self.nbytes
        for entry in group:
            if end % entry.dtype.itemsize:
                return False
            end += entry.nbytes
        return end <= self.capacity

    def add(self, group: Sequence[AnyEntry]) -> None:
        """Append a group; an empty bucket takes one of any size."""
        for entry in group:
            self.entries.append(Entry(entry.name, entry.dtype, entry.shape))
            self.nbytes += entry.nbytes

    def clear(self) -> None:
        """Empty the bucket."""
        self.entries, self.nbytes = [], 0


class Bucket(BucketLayout[NamedTensor]):
    """A bucket that holds the tensors themselves.

    Args:
        capacity: see `BucketLayout`.
        device: of the buffer.
    """

    def __init__(self, capacity: int, device: str):
        super().__init__(capacity)
        self._device = device
        self._buffer = self._empty(capacity)

    @property
    def content(self) -> Tensor:
        """Shape (bytes used,), uint8."""
        return self._buffer[: self.nbytes]

    @property
    def parts(self) -> list[Tensor]:
        """What is sent, one after the other."""
        return [self.content]

    def add(self, group: Sequence[NamedTensor]) -> None:
        """Copy a group in; one that is larger than the bucket gets a buffer of its own."""
        size, start = sum(tensor.nbytes for tensor in group), self.nbytes
        if start + size > self._buffer.numel():
            del self._buffer
            self._buffer = self._empty(size)
        super().add(group)
        for named in group:
            target = self._buffer[start : start + named.nbytes]
            target.view(named.dtype).view(named.shape).copy_(named.tensor.detach())
            start += named.nbytes

    def clear(self) -> None:
        super().clear()
        if self._buffer.numel() > self.capacity:
            del self._buffer
            self._buffer = self._empty(self.capacity)

    def _empty(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self._device)


class LooseBucket(BucketLayout[NamedTensor]):
    """A bucket that copies nothing: it holds the tensors where they are, which must not change until they are sent."""

    load_format = None

    def __init__(self, capacity: int):
        super().__init__(capacity)
        self.parts: list[Tensor] = []

    def add(self, group: Sequence[NamedTensor]) -> None:
        super().add(group)
        self.parts += [named.tensor.detach().contiguous() for named in group]

    def clear(self) -> None:
        super().clear()
        self.parts = []


def fill_buckets[Filled: BucketLayout[Any]](
    bucket: Filled, groups: Iterable[Sequence[Any]]
) -> Iterator[tuple[Filled, bool]]:
    """Fill a bucket again and again; each time with whether it is the last.

    The same bucket is filled again when the next one is requested, and one group is held beside it. A group's tensors
    go in by falling element size, so that small elements do not leave larger ones between their multiples.

    Raises:
        DataError: there are no tensors.
    """
    for group in groups:
        group = sorted(group, key=lambda entry: -entry.dtype.itemsize)
        if bucket.entries and not bucket.fits(group):
            yield bucket, False
            bucket.clear()
        bucket.add(group)
        del group
    if not bucket.entries:
        raise DataError("no weights to send")
    yield bucket, True


def plan_buckets(groups: Iterable[Sequence[Entry]], capacity: int) -> list[list[Entry]]:
    """The entries of each bucket, computed from names, types and shapes alone."""
    return [bucket.entries for bucket, _ in fill_buckets(BucketLayout[Entry](capacity), groups)]
