"""Sharded tensors on disk: each rank writes its parts, and any layout of ranks reads the parts that it needs.

A kind of tensors (``model``, ``optimizer``, ...) has one safetensors file per rank with parts of it. The key of a part
is its number; the file's metadata says which part of which whole tensor it is. The files contain nothing executable,
and only the requested numbers are read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_r1.checkpoint.manifest import MANIFEST_NAME, FileRecord
from megatron_r1.checkpoint.tensor_file import TYPES, Entry, TensorFile, write_tensor_file
from megatron_r1.checkpoint.tensors import tensor_path
from megatron_r1.errors import DataError
from megatron_r1.files import hold

INDEX = "parts"


@dataclass(frozen=True)
class TensorPart:
    """A box-shaped part of a whole tensor."""

    name: str
    """Name of the whole tensor."""
    whole_shape: tuple[int, ...]
    offset: tuple[int, ...]
    """Index of the box's first element."""
    tensor: Tensor


def write_parts(folder: Path, kind: str, rank: int, parts: Iterable[TensorPart]) -> dict[str, FileRecord]:
    """Write this rank's parts of one kind; a rank that has none writes no file.

    Returns:
        the file's name and record.
    """
    parts = list(parts)
    if not parts:
        return {}
    index = [[part.name, part.whole_shape, part.offset] for part in parts]
    tensors = [(str(number), part.tensor) for number, part in enumerate(parts)]
    path = tensor_path(folder, kind, rank)
    return {path.name: write_tensor_file(path, tensors, {INDEX: json.dumps(index)})}


def write_whole_tensors(
    folder: Path, kind: str, entries: Sequence[Entry], tensors: Iterable[Tensor]
) -> dict[str, FileRecord]:
    """Write whole tensors of one kind one after the other, as one rank's; returns the file's name and record.

    Args:
        entries: of the tensors, in their order.
    """
    numbered = [Entry(str(number), entry.dtype, entry.shape) for number, entry in enumerate(entries)]
    index = [[entry.name, entry.shape, (0,) * len(entry.shape)] for entry in entries]
    path = tensor_path(folder, kind, 0)
    with TensorFile(path, numbered, {INDEX: json.dumps(index)}) as file:
        for entry, tensor in zip(numbered, tensors, strict=True):
            file.write(entry.name, tensor)
        return {path.name: file.close()}


@dataclass(frozen=True)
class _Box:
    """A box of elements of a whole tensor."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    def common(self, other: _Box) -> _Box | None:
        """The intersection; None where it is empty."""
        low = [max(a, b) for a, b in zip(self.offset, other.offset, strict=True)]
        ends = zip(self.offset, self.shape, other.offset, other.shape, strict=True)
        size = [min(a + n, b + m) - start for (a, n, b, m), start in zip(ends, low, strict=True)]
        return _Box(tuple(low), tuple(size)) if all(extent > 0 for extent in size) else None

    def within(self, other: _Box) -> tuple[slice, ...]:
        """This box as an index into the other one."""
        starts = [a - b for a, b in zip(self.offset, other.offset, strict=True)]
        return tuple(slice(start, start + size) for start, size in zip(starts, self.shape, strict=True))


@dataclass(frozen=True)
class _StoredPart:
    """Location of a part on disk."""

    file: int
    key: str
    box: _Box


class WholeTensors(Mapping[str, Tensor]):
    """The whole tensors of one kind in a verified checkpoint; each is read when it is accessed.

    The checkpoint's run does not remove it until this object is closed or collected.
    """

    def __init__(self, folder: Path, kind: str):
        """
        Raises:
            DataError: a file was not written by `write_parts`.
        """
        self._open, self._folder, self._kind = ExitStack(), folder, kind
        if held := hold(folder / MANIFEST_NAME):
            self._open.enter_context(held)
        self._files: list[Any] = []
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._parts: dict[str, list[_StoredPart]] = {}
        for number, path in enumerate(sorted(folder.glob(f"{kind}-*.safetensors"))):
            try:
                file = self._open.enter_context(safe_open(path, "pt"))
            except (OSError, SafetensorError) as error:
                raise DataError(f"{path}: cannot be read: {error}") from None
            self._files.append(file)
            for key, (name, whole_shape, offset) in enumerate(_index(path, file)):
                shape = tuple(file.get_slice(str(key)).get_shape())
                if self._shapes.setdefault(name, tuple(whole_shape)) != tuple(whole_shape):
                    raise DataError(f"{path}: {name} has shape {whole_shape}, elsewhere {self._shapes[name]}")
                self._parts.setdefault(name, []).append(_StoredPart(number, str(key), _Box(tuple(offset), shape)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    @property
    def entries(self) -> dict[str, Entry]:
        """Type and shape of every tensor by name, from headers alone."""
        types = {
            name: self._files[parts[0].file].get_slice(parts[0].key).get_dtype() for name, parts in self._parts.items()
        }
        return {name: Entry(name, TYPES[types[name]], shape) for name, shape in self._shapes.items()}

    def __getitem__(self, name: str) -> Tensor:
        shape = self._shapes[name]
        return self.part(name, shape, (0,) * len(shape), shape)

    def parts(self, name: str) -> int:
        """Number of parts of a tensor."""
        return len(self._parts[name])

    def part(self, name: str, whole_shape: tuple[int, ...], offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        """The box of `shape` at `offset`, from any ranks' files; read-only, because it may be the mapped file itself.

        Raises:
            DataError: there is no such tensor, it has another shape, or some of its numbers are missing or duplicated.
        """
        if name not in self._shapes:
            raise DataError(f"{name}: missing from {self._folder}/{self._kind}-*.safetensors")
        if self._shapes[name] != tuple(whole_shape):
            raise DataError(f"{name}: has shape {self._shapes[name]}, must have {tuple(whole_shape)}")
        wanted = _Box(tuple(offset), tuple(shape))
        found = [(stored, box) for stored in self._parts[name] if (box := wanted.common(stored.box))]
        for number, (_, box) in enumerate(found):
            if any(box.common(other) for _, other in found[:number]):
                raise DataError(f"{name}: some of its numbers are twice in {self._folder}")
        # Disjoint boxes inside the requested one cover it if their sizes add up to its size.
        if missing := prod(shape) - sum(prod(box.shape) for _, box in found):
            raise DataError(f"{name}: {missing} of {prod(shape)} numbers are missing from {self._folder}")
        pieces = [(box.within(wanted), self._read(stored, box)) for stored, box in found]
        if len(pieces) == 1:
            return pieces[0][1]
        result = torch.empty(shape, dtype=pieces[0][1].dtype)
        for box_in_request, numbers in pieces:
            result[box_in_request] = numbers
        return result

    def _read(self, stored: _StoredPart, box: _Box) -> Tensor:
        file = self._files[stored.file]
        if box == stored.box:
            whole: Tensor = file.get_tensor(stored.key)
            return whole
        part: Tensor = file.get_slice(stored.key)[box.within(stored.box)]
        return part


def _index(path: Path, file: Any) -> list[tuple[str, list[int], list[int]]]:
    """For each part in a file: name and shape of the whole tensor, and offset in it."""
    try:
        index = [(str(name), list(shape), list(offset)) for name, shape, offset in json.loads(file.metadata()[INDEX])]
    except (TypeError, KeyError, ValueError, RecursionError):
        raise DataError(f"{path}: has no list of the parts that it contains") from None
    if sorted(file.keys()) != sorted(map(str, range(len(index)))):
        raise DataError(f"{path}: contains other parts than it lists")
    for key, (name, shape, offset) in enumerate(index):
        extents = zip(offset, file.get_slice(str(key)).get_shape(), shape, strict=False)
        if len(offset) != len(shape) or any(start < 0 or start + size > end for start, size, end in extents):
            raise DataError(f"{path}: a part of {name} exceeds the whole tensor")
    return index
