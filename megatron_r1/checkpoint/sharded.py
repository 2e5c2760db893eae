"""Tensors that many ranks hold in parts, on disk: each rank writes its parts, any layout of ranks reads what it needs.

A kind of tensors (``model``, ``optimizer``, ...) is one safetensors file per rank that has parts of it. A part's key is
its number; the file's metadata says which part of which whole tensor it is. There is nothing in it to be executed, and
nothing is read but the numbers that are asked for.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_r1.checkpoint.tensor_file import TYPE_NAMES, Entry
from megatron_r1.errors import DataError

INDEX = "parts"
_TYPES = {name: dtype for dtype, name in TYPE_NAMES.items()}


@dataclass(frozen=True)
class Part:
    """A box of numbers out of a whole tensor."""

    name: str
    """Of the whole tensor."""
    whole_shape: tuple[int, ...]
    offset: tuple[int, ...]
    """Where the box begins."""
    tensor: Tensor


def write_parts(folder: Path, kind: str, rank: int, parts: Iterable[Part]) -> None:
    """Write this rank's parts of one kind; a rank that has none writes no file."""
    tensors: dict[str, Tensor] = {}
    index = []
    for number, part in enumerate(parts):
        # Parameters are views of shared buffers; each is stored as a tensor of its own.
        tensors[str(number)] = part.tensor.detach().cpu().contiguous().clone()
        index.append([part.name, part.whole_shape, part.offset])
    if tensors:
        save_file(tensors, folder / f"{kind}-{rank:05d}.safetensors", {INDEX: json.dumps(index)})


@dataclass(frozen=True)
class _Stored:
    """Where a part lies on disk."""

    file: int
    key: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]


class WholeTensors(Mapping[str, Tensor]):
    """The whole tensors of one kind in a verified checkpoint, read one at a time when asked for."""

    def __init__(self, folder: Path, kind: str):
        """
        Raises:
            DataError: a file is not what `write_parts` wrote.
        """
        self._open, self._folder, self._kind = ExitStack(), folder, kind
        self._files: list[Any] = []
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._parts: dict[str, list[_Stored]] = {}
        for number, path in enumerate(sorted(folder.glob(f"{kind}-*.safetensors"))):
            file = self._open.enter_context(safe_open(path, "pt"))
            self._files.append(file)
            try:
                index = json.loads(file.metadata()[INDEX])
            except (TypeError, KeyError, ValueError):
                raise DataError(f"{path}: does not say which parts of which tensors it holds") from None
            for key, (name, whole_shape, offset) in enumerate(index):
                shape = tuple(file.get_slice(str(key)).get_shape())
                if self._shapes.setdefault(name, tuple(whole_shape)) != tuple(whole_shape):
                    raise DataError(f"{path}: {name} has shape {whole_shape}, elsewhere {self._shapes[name]}")
                self._parts.setdefault(name, []).append(_Stored(number, str(key), tuple(offset), shape))

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
        return {name: Entry(name, _TYPES[types[name]], shape) for name, shape in self._shapes.items()}

    def __getitem__(self, name: str) -> Tensor:
        shape = self._shapes[name]
        return self.part(name, shape, (0,) * len(shape), shape)

    def part(self, name: str, whole_shape: tuple[int, ...], offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        """The box of `shape` at `offset`, whoever wrote its numbers.

        Raises:
            DataError: no such tensor, another shape, or some of its numbers were never written, or twice.
        """
        if name not in self._shapes:
            raise DataError(f"{name}: missing from {self._folder}/{self._kind}-*.safetensors")
        if self._shapes[name] != tuple(whole_shape):
            raise DataError(f"{name}: has shape {self._shapes[name]}, must have {tuple(whole_shape)}")
        result: Tensor | None = None
        missing = torch.ones(shape, dtype=torch.bool)
        for stored in self._parts[name]:
            low = [max(a, b) for a, b in zip(offset, stored.offset, strict=True)]
            high = [min(a + n, b + m) for a, n, b, m in zip(offset, shape, stored.offset, stored.shape, strict=True)]
            if any(a >= b for a, b in zip(low, high, strict=True)):
                continue
            there = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, stored.offset, strict=True))
            here = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, offset, strict=True))
            file = self._files[stored.file]
            numbers = file.get_slice(stored.key)[there] if there else file.get_tensor(stored.key)
            if result is None:
                result = torch.empty(shape, dtype=numbers.dtype)
            if not missing[here].all():
                raise DataError(f"{name}: some of its numbers are twice in {self._folder}")
            result[here], missing[here] = numbers, False
        if result is None or missing.any():
            raise DataError(f"{name}: {int(missing.sum())} of {prod(shape)} numbers are missing from {self._folder}")
        return result
