"""Reads rows of text from files: JSONL, plain text and Parquet.

A scan of a file gives its hash and divides it into spans, which workers read separately. A span knows the number of
its first row, so that any worker can name a bad row by file and line. Spans depend on the file and the target size.

A row of JSONL is a line; a plain text file is one row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from megatron_r1.errors import ConfigError, DataError

BLOCK = 1 << 20
SUFFIXES = (".jsonl", ".txt", ".parquet")


class InputSpan(NamedTuple):
    """Consecutive rows of one file."""

    source: int
    """Index of the file in the list of inputs."""
    start: int
    """First byte; of Parquet, first row group."""
    stop: int
    """Byte after the last; of Parquet, row group after the last."""
    first_row: int
    """Number of the first row, from 1."""
    size: int
    """Bytes of input."""


@dataclass(frozen=True, slots=True)
class Scan:
    """Hash of a file, and its spans."""

    sha256: str
    spans: list[InputSpan]


class RawRecord(NamedTuple):
    """One row: its text, or the reason why it cannot be used."""

    source: int
    number: int
    """Line, or row of Parquet, from 1."""
    text: str
    problem: str
    """Empty for a good row."""


def scan(path: str, source: int, target: int) -> Scan:
    """Hash a file and divide it.

    Args:
        source: index of the file in the list of inputs.
        target: bytes that a span should have.

    Raises:
        DataError: the file cannot be read.
        ConfigError: the file has an unknown suffix.
    """
    check_suffix(path, "inputs")
    try:
        if path.endswith(".jsonl"):
            return _scan_lines(path, source, target)
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if path.endswith(".txt"):
            size = Path(path).stat().st_size
            return Scan(digest, [InputSpan(source, 0, size, 1, size)])
        return Scan(digest, _scan_row_groups(path, source))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def check_suffix(path: str, key: str) -> None:
    """Refuse a file with an unknown suffix."""
    if not path.endswith(SUFFIXES):
        raise ConfigError(key, path, f"must end in one of {', '.join(SUFFIXES)}")


def _scan_lines(path: str, source: int, target: int) -> Scan:
    digest, spans = hashlib.sha256(), []
    start, position, row, rows = 0, 0, 1, 0
    with open(path, "rb") as file:
        while block := file.read(min(BLOCK, target)):
            digest.update(block)
            cut = block.rfind(b"\n") + 1
            if position + len(block) - start >= target and cut:
                stop = position + cut
                rows += block.count(b"\n", 0, cut)
                spans.append(InputSpan(source, start, stop, row, stop - start))
                start, row, rows = stop, row + rows, 0
            else:
                rows += block.count(b"\n")
            position += len(block)
    if position > start:
        spans.append(InputSpan(source, start, position, row, position - start))
    return Scan(digest.hexdigest(), spans)


def read(path: str, span: InputSpan, fields: Sequence[str]) -> Iterator[RawRecord]:
    """The rows of a span, good and bad, in order.

    Args:
        fields: whose values make a row's text, joined by line breaks.
    """
    kind = Path(path).suffix
    rows = {".jsonl": _read_lines, ".txt": _read_text, ".parquet": _read_row_groups}[kind](path, span, fields)
    for offset, (text, problem) in enumerate(rows):
        yield RawRecord(
            span.source,
            span.first_row + offset,
            text,
            problem or ("has no text" if not text or text.isspace() else ""),
        )


def _read_lines(path: str, span: InputSpan, fields: Sequence[str]) -> Iterator[tuple[str, str]]:
    with open(path, "rb") as file:
        file.seek(span.start)
        left = span.size
        while left > 0:
            line = file.readline()
            if not line:
                raise DataError(f"{path}: became shorter since it was scanned")
            left -= len(line)
            if line.isspace():
                yield "", "is empty"
                continue
            try:
                row = orjson.loads(line)
            except orjson.JSONDecodeError as error:
                yield "", f"is not JSON ({error.msg})"
                continue
            yield _text_of(row, fields)


def _text_of(row: Any, fields: Sequence[str]) -> tuple[str, str]:
    if not isinstance(row, dict):
        return "", "is not a JSON object"
    for name in fields:
        if not isinstance(row.get(name), str):
            return "", f"field {name} is {'not text' if name in row else 'missing'}"
    return "\n".join(row[name] for name in fields), ""


def _read_text(path: str, span: InputSpan, fields: Sequence[str]) -> Iterator[tuple[str, str]]:
    try:
        yield Path(path).read_bytes().decode("utf-8"), ""
    except UnicodeDecodeError as error:
        yield "", f"is not UTF-8 at byte {error.start}"


def _parquet(path: str) -> Any:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(f"{path}: reading Parquet needs the package pyarrow") from error
    try:
        return parquet.ParquetFile(path)
    except ValueError as error:  # pyarrow's own errors derive from it
        raise DataError(f"{path}: is not a Parquet file ({' '.join(str(error).split())})") from error


def _scan_row_groups(path: str, source: int) -> list[InputSpan]:
    with _parquet(path) as file:
        groups = [file.metadata.row_group(index) for index in range(file.metadata.num_row_groups)]
        spans, row = [], 1
        for index, group in enumerate(groups):
            spans.append(InputSpan(source, index, index + 1, row, group.total_byte_size))
            row += group.num_rows
    return spans


def _read_row_groups(path: str, span: InputSpan, fields: Sequence[str]) -> Iterator[tuple[str, str]]:
    with _parquet(path) as file:
        columns = [name for name in fields if name in file.schema_arrow.names]
        for index in range(span.start, span.stop):
            count = file.metadata.row_group(index).num_rows
            rows = file.read_row_group(index, columns=columns).to_pylist() if columns else [{}] * count
            yield from (_text_of(row, fields) for row in rows)
