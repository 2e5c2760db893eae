"""The digest of a file: BLAKE3 of its bytes, or, of a safetensors file, of the BLAKE3 of its header and each tensor.

BLAKE3 is as strong as SHA-256 and several times as fast: 6.6 against 1.8 GB/s on a core with AVX-512, and `cp` copies
at 2. A digest made of those of the tensors is computed by all cores, and a conversion, which records each tensor's
BLAKE3 anyway, has it for nothing. It says as much: tensors lie end to end, and where they lie is in the header. A file
that is no proper safetensors file, whatever its name, counts as bytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from blake3 import blake3

THREADS = min(8, os.cpu_count() or 1)
_JOB, _BUFFER = 1 << 22, 1 << 19
_LONGEST_HEADER = 100_000_000
"""As safetensors has it."""


class Span(NamedTuple):
    """A part of a file that is hashed by itself."""

    start: int
    end: int


def digest_of_parts(parts: Sequence[bytes]) -> str:
    """The digest of a safetensors file in hex.

    Args:
        parts: BLAKE3 of the header, with the eight bytes of its length, and of each tensor that is not empty, in
            the order of the file. Of a header alone, the digest is its BLAKE3.
    """
    return parts[0].hex() if len(parts) == 1 else blake3(b"".join(parts)).hexdigest()


def digests(paths: Sequence[Path], threads: int = THREADS) -> Iterator[str]:
    """The digest of each file, in order; all threads work on a file at a time, or on several small ones.

    Raises:
        OSError: a file cannot be read.
    """
    spans = {path: spans_of(path) for path in paths}
    jobs = [(path, job) for path in paths for job in _jobs(spans[path])]
    with ThreadPoolExecutor(threads) as pool:
        found = (part for parts in pool.map(_hashed, *zip(*jobs, strict=True)) for part in parts) if jobs else iter(())
        try:
            for path in paths:
                yield digest_of_parts(list(islice(found, len(spans[path]))))
        finally:
            pool.shutdown(cancel_futures=True)


def digest_of_file(path: Path) -> str:
    """The digest of one file.

    Raises:
        OSError: it cannot be read.
    """
    return next(digests([path]))


def spans_of(path: Path) -> list[Span]:
    """Header and tensors of a safetensors file, or the whole of another file."""
    size = path.stat().st_size
    return (path.suffix == ".safetensors" and _header_and_tensors(path, size)) or [Span(0, size)]


def _header_and_tensors(path: Path, size: int) -> list[Span]:
    """Empty where tensors do not lie end to end up to the end of the file, or there are none."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(_LONGEST_HEADER, size - 8):
            return []
        try:
            header = json.loads(file.read(length))
            offsets = [entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"]
            places = sorted((int(start), int(end)) for start, end in offsets if start != end)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return []
    ends = [0, *(end for _, end in places)]
    if [start for start, _ in places] != ends[:-1] or ends[-1] != size - 8 - length or ends != sorted(ends):
        return []
    first = 8 + length
    return [Span(0, first), *(Span(first + start, first + end) for start, end in places)] if places else []


def _jobs(spans: Sequence[Span]) -> Iterator[list[Span]]:
    """Runs of neighbours, so that what is small is not a job of its own."""
    job: list[Span] = []
    for span in spans:
        job.append(span)
        if span.end - job[0].start >= _JOB:
            yield job
            job = []
    if job:
        yield job


def _hashed(path: Path, spans: Sequence[Span]) -> list[bytes]:
    """BLAKE3 of each span; both reading and hashing release the GIL."""
    buffer, found = memoryview(bytearray(min(_BUFFER, max(span.end - span.start for span in spans)))), []
    with path.open("rb", buffering=0) as file:
        for at, end in spans:
            part = blake3()
            while at < end and (count := os.preadv(file.fileno(), [buffer[: end - at]], at)):
                part.update(buffer[:count])
                at += count
            found.append(part.digest())
    return found
