"""megatron-core's indexed format: `PREFIX.bin` holds the token ids of all documents end to end, `PREFIX.idx` where.

The index is little-endian: 9 bytes of magic, version 1 (8 bytes), a code for the type of the ids (1), the numbers of
sequences and of document bounds (8 each), then each sequence's length (int32), its offset in bytes (int64), and the
sequence at which each document begins, with the number of sequences as the last bound (int64). Writing makes one
sequence of each document; reading takes any file of that format. megatron-core's own reader needs torch, which this
package does not import.
"""

from __future__ import annotations

import hashlib
import os
import struct
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import numpy as np

from megatron_r1.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEAD = struct.Struct("<9sQBQQ")
CODES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
SMALL_VOCABULARY = 65_500
"""Vocabularies below this are stored in 16 bits, as megatron-core does."""


def token_dtype(vocab_size: int) -> np.dtype:
    """The type that token ids of a vocabulary are stored in."""
    return np.dtype(np.uint16 if vocab_size < SMALL_VOCABULARY else np.int32)


class IndexedWriter:
    """Context manager that writes one pair of files; the index, written last, is missing after an error.

    Args:
        prefix: path without `.bin` and `.idx`.
        dtype: of the stored token ids.
    """

    def __init__(self, prefix: Path, dtype: np.dtype):
        self._index_path, self._dtype = with_suffix(prefix, ".idx"), np.dtype(dtype)
        self._code = next(code for code, kind in CODES.items() if kind == self._dtype)
        self._file: BinaryIO = with_suffix(prefix, ".bin").open("wb")
        self._digest = hashlib.sha256()
        self._lengths: list[np.ndarray] = []
        self.digests: dict[str, str] = {}
        """SHA-256 of the two files, by suffix; set when the context exits."""

    def add(self, tokens_T: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents.

        Args:
            tokens_T: their token ids, end to end.
            lengths: tokens of each.
        """
        if lengths.sum() != len(tokens_T):
            raise ValueError(f"{len(tokens_T)} tokens for documents of {lengths.sum()}")
        raw = tokens_T.astype(self._dtype).tobytes()
        self._digest.update(raw)
        self._file.write(raw)
        self._lengths.append(lengths.astype(np.int32))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            _synced(self._file)
            lengths = np.concatenate([np.empty(0, np.int32), *self._lengths])
            index = self._index(lengths)
            with self._index_path.open("wb") as file:
                file.write(index)
                _synced(file)
            self.digests = {".bin": self._digest.hexdigest(), ".idx": hashlib.sha256(index).hexdigest()}
        self._file.close()

    def _index(self, lengths: np.ndarray) -> bytes:
        count = len(lengths)
        ends = np.cumsum(lengths, dtype=np.int64) * self._dtype.itemsize
        offsets = np.concatenate([np.zeros(1, np.int64), ends])[:count]
        bounds = np.arange(count + 1, dtype=np.int64)
        head = HEAD.pack(MAGIC, VERSION, self._code, count, count + 1)
        return head + lengths.tobytes() + offsets.tobytes() + bounds.tobytes()


def _synced(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


class IndexedTokens:
    """Documents of one pair of files, memory-mapped.

    Args:
        prefix: path without `.bin` and `.idx`.

    Raises:
        DataError: a file is missing, cut short, or not of this format.
    """

    def __init__(self, prefix: Path):
        path, tokens_path = with_suffix(prefix, ".idx"), with_suffix(prefix, ".bin")
        try:
            raw = np.memmap(path, dtype=np.uint8, mode="r")
            size = tokens_path.stat().st_size
            magic, version, code, sequences, bounds = HEAD.unpack(raw[: HEAD.size].tobytes())
        except OSError as error:
            raise DataError(f"{error.filename}: cannot be read ({error.strerror})") from error
        except (ValueError, struct.error) as error:  # an empty file cannot be mapped
            raise DataError(f"{path}: is cut short") from error
        if magic != MAGIC or version != VERSION or code not in CODES:
            raise DataError(f"{path}: is not an index of version {VERSION} with whole-number tokens")
        if len(raw) < HEAD.size + 12 * sequences + 8 * bounds:
            raise DataError(f"{path}: is cut short: {len(raw)} bytes for {sequences} sequences")
        lengths = np.frombuffer(raw, np.int32, sequences, HEAD.size)
        offsets = np.frombuffer(raw, np.int64, sequences, HEAD.size + lengths.nbytes)
        documents = np.frombuffer(raw, np.int64, bounds, HEAD.size + lengths.nbytes + offsets.nbytes)
        dtype = np.dtype(CODES[code])
        ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
        if (offsets != ends[:-1] * dtype.itemsize).any() or ends[-1] * dtype.itemsize != size:
            raise DataError(f"{tokens_path}: has {size} bytes; its index requires {ends[-1] * dtype.itemsize}")
        self.bounds: np.ndarray = ends[documents]
        """Token at which each document begins, and the end of the last: int64 [documents + 1]."""
        self.tokens: np.ndarray = (
            np.memmap(tokens_path, dtype=dtype, mode="r") if size else np.empty(0, dtype=dtype)
        )  # an empty file cannot be mapped

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def document(self, index: int) -> np.ndarray:
        """Token ids of one document, as stored."""
        return self.tokens[self.bounds[index] : self.bounds[index + 1]]


def with_suffix(prefix: Path, suffix: str) -> Path:
    """`prefix` with `suffix` appended; unlike `Path.with_suffix`, it keeps what follows a dot in the name."""
    return prefix.with_name(prefix.name + suffix)
