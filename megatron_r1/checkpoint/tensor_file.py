"""Safetensors files that are written one tensor at a time and hashed meanwhile.

safetensors' own `save_file` needs all tensors in memory at once, and a hash would have to read the file again. Here the
header is written first, because names, types and shapes are known beforehand; then each tensor is written and freed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import torch
from torch import Tensor

from megatron_r1.checkpoint.manifest import FileRecord

TYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Spelling of types in a safetensors header."""
TYPES = {name: dtype for dtype, name in TYPE_NAMES.items()}
_ALIGNMENT = 8
_CHUNK = 1 << 26


@dataclass(frozen=True, slots=True)
class Entry:
    """Name, type and shape of a tensor in a file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class TensorFile:
    """Writer of a safetensors file, which is durable once `close` has returned.

    Args:
        path: of the file, which must not exist.
        entries: its tensors, in the order of the calls of `write`.
        metadata: for the header.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, path: Path, entries: Sequence[Entry], metadata: Mapping[str, str] | None = None):
        self._waiting, self._hash, self._size = list(reversed(entries)), hashlib.sha256(), 0
        # Writing and hashing both release the GIL: a chunk is hashed while it is written.
        self._hasher = ThreadPoolExecutor(1)
        self._file = path.open("xb", buffering=0)
        self._put(_header(entries, metadata or {}))

    def write(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor, from any device.

        Raises:
            ValueError: the tensor is not the next entry.
        """
        entry = self._waiting.pop() if self._waiting else None
        if entry != Entry(name, tensor.dtype, tuple(tensor.shape)):
            raise ValueError(f"{self._file.name}: {name} {tensor.dtype} {tuple(tensor.shape)}: must be {entry}")
        # `Tensor.numpy` would make the tensor's storage unresizable, and train/offload.py resizes storages.
        flat = np.from_dlpack(tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8))
        for start in range(0, flat.size, _CHUNK):
            self._put(flat[start : start + _CHUNK].data)

    def close(self) -> FileRecord:
        """Make the file durable; returns its size and hash.

        Raises:
            ValueError: an entry was never written.
        """
        with self._file:
            if self._waiting:
                raise ValueError(f"{self._file.name}: {self._waiting[-1].name} was never written")
            os.fsync(self._file.fileno())
        return FileRecord(self._size, self._hash.hexdigest())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._hasher.shutdown()
        self._file.close()

    def _put(self, content: bytes | memoryview) -> None:
        hashed = self._hasher.submit(self._hash.update, content)
        view = memoryview(content)
        while view:  # an unbuffered write may take only a part
            written = self._file.write(view)
            view, self._size = view[written:], self._size + written
        hashed.result()


def write_tensor_file(
    path: Path, tensors: Iterable[tuple[str, Tensor]], metadata: Mapping[str, str] | None = None
) -> FileRecord:
    """Write a file of tensors that are all in memory; returns its size and hash."""
    tensors = list(tensors)
    entries = [Entry(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors]
    with TensorFile(path, entries, metadata) as file:
        for name, tensor in tensors:
            file.write(name, tensor)
        return file.close()


def _header(entries: Sequence[Entry], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for entry in entries:
        if entry.name in header:
            raise ValueError(f"{entry.name}: announced twice")
        end = offset + entry.nbytes
        kind = TYPE_NAMES[entry.dtype]
        header[entry.name] = {"dtype": kind, "shape": list(entry.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
