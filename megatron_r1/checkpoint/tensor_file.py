"""Safetensors files that are written one tensor at a time, hashed and brought to disk meanwhile.

safetensors' own `save_file` needs all tensors in memory at once, and a hash would have to read the file again. Here the
header is written first, because names, types and shapes are known beforehand; then each tensor is written from where
it lies, without a copy. Other threads follow the writer: some hash what was written, one lets the disk begin with it,
so that the last fsync has little left to wait for.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import torch
from blake3 import blake3
from torch import Tensor

from megatron_r1.checkpoint.digest import THREADS, digest_of_parts
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
_BEHIND = 1 << 28
"""Bytes that hashing may be behind writing, in memory that written tensors keep; one tensor may be larger."""
_STRIDE = 1 << 22
"""Bytes after which the disk begins to write."""


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
        self._waiting = list(reversed(entries))
        # Writing, hashing and flushing release the GIL.
        self._hashers, self._flusher = ThreadPoolExecutor(THREADS), ThreadPoolExecutor(1)
        self._parts: list[bytes] = []
        self._unhashed: deque[tuple[int, Future[bytes]]] = deque()
        self._size = self._begun = self._behind = 0
        self._file = path.open("xb", buffering=0)
        self._put(memoryview(_header(entries, metadata or {})), None)

    def write(self, name: str, tensor: Tensor, blake3_hex: str | None = None) -> None:
        """Write the next tensor, from any device; its numbers must stay until `close`.

        Args:
            blake3_hex: BLAKE3 of its bytes, where the caller knows it.

        Raises:
            ValueError: the tensor is not the next entry.
        """
        entry = self._waiting.pop() if self._waiting else None
        if entry != Entry(name, tensor.dtype, tuple(tensor.shape)):
            raise ValueError(f"{self._file.name}: {name} {tensor.dtype} {tuple(tensor.shape)}: must be {entry}")
        if tensor.numel():
            # `Tensor.numpy` would make the tensor's storage unresizable, and train/offload.py resizes storages.
            flat = np.from_dlpack(tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8))
            self._put(flat.data, blake3_hex)

    def close(self) -> FileRecord:
        """Make the file durable; returns its size and digest.

        Raises:
            ValueError: an entry was never written.
        """
        with self._file:
            if self._waiting:
                raise ValueError(f"{self._file.name}: {self._waiting[-1].name} was never written")
            self._flusher.shutdown()
            os.fsync(self._file.fileno())
        self._wait_for_hashes(0)
        return FileRecord(self._size, digest_of_parts(self._parts))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._hashers.shutdown(cancel_futures=True)
        self._flusher.shutdown(cancel_futures=True)
        self._file.close()

    def _put(self, content: memoryview, blake3_hex: str | None) -> None:
        part = self._hashers.submit(_blake3, content) if blake3_hex is None else _known(bytes.fromhex(blake3_hex))
        self._unhashed.append((len(content), part))
        self._behind += len(content)
        view = content
        while view:  # an unbuffered write may take only a part
            written = self._file.write(view[:_STRIDE])
            view, self._size = view[written:], self._size + written
            if self._size - self._begun >= _STRIDE:
                self._begin_to_flush()
        self._wait_for_hashes(_BEHIND)

    def _begin_to_flush(self) -> None:
        """Let the disk begin with what was written since the last time.

        Told that nobody will read a range, Linux starts to write it; fdatasync would also wait for it and commit the
        journal, and so takes longer than what it saves. Errors of the disk show in the last fsync.
        """
        start, self._begun = self._begun, self._size
        length = self._size - start
        self._flusher.submit(os.posix_fadvise, self._file.fileno(), start, length, os.POSIX_FADV_DONTNEED)

    def _wait_for_hashes(self, behind: int) -> None:
        while self._unhashed and (self._behind > behind or self._unhashed[0][1].done()):
            size, part = self._unhashed.popleft()
            self._parts.append(part.result())
            self._behind -= size


def _blake3(content: memoryview) -> bytes:
    return blake3(content).digest()


def _known(part: bytes) -> Future[bytes]:
    future: Future[bytes] = Future()
    future.set_result(part)
    return future


def write_tensor_file(
    path: Path, tensors: Iterable[tuple[str, Tensor]], metadata: Mapping[str, str] | None = None
) -> FileRecord:
    """Write a file of tensors that are all in memory; returns its size and digest."""
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
