"""Reads rows of text from files: those of `row_files`, and plain text.

A scan of a file gives its hash and divides it into spans, which workers read separately. A span knows the number of
its first row, so that any worker can name a bad row by file and line. Spans depend on the file and the target size.
JSON Lines are divided at line breaks and Parquet at row groups; any other file is one span.

A plain text file is one row.
"""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

from megatron_r1.data.row_files import (
    FORMATS,
    JSON_SUFFIXES,
    ROWS_AT_ONCE,
    BadRow,
    Numbered,
    as_object,
    begins_as_array,
    is_gzipped,
    is_row_file,
    json_rows,
    numbered_rows,
    open_text,
    table_rows,
)
from megatron_r1.data.row_sources import RowSource
from megatron_r1.errors import ConfigError, DataError

BLOCK = 1 << 20


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


def input_files(paths: Iterable[str], split: str, subset: str, key: str) -> tuple[str, ...]:
    """The files of inputs, each of which is a file or the folder of a Hugging Face dataset.

    Args:
        split, subset: which rows of a folder, as in `RowSource`.
        key: name of the inputs, for errors.

    Raises:
        ConfigError: a path, a split or a configuration names no rows.
        DataError: a folder is damaged.
    """
    files: list[str] = []
    for path in paths:
        is_folder = Path(path).is_dir()
        files += map(str, RowSource(Path(path), split, subset, key).files()) if is_folder else [path]
    return tuple(files)


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
        if _has_lines(path):
            return _scan_lines(path, source, target)
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if path.endswith(".parquet"):
            return Scan(digest, _scan_row_groups(path, source))
        size = Path(path).stat().st_size
        return Scan(digest, [InputSpan(source, 0, size, 1, size)])
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def check_suffix(path: str, key: str) -> None:
    """Refuse a file with an unknown suffix."""
    if not (is_row_file(Path(path)) or path.endswith(".txt")):
        raise ConfigError(key, path, f"must be a file ({FORMATS}, or .txt) or a dataset's folder")


def _has_lines(path: str) -> bool:
    """Whether a file is JSON Lines that can be read from any line on: not packed, and no array."""
    if not path.endswith(JSON_SUFFIXES):
        return False
    with open_text(Path(path)) as file:
        return not is_gzipped(file) and not begins_as_array(file)


def _scan_lines(path: str, source: int, target: int) -> Scan:
    digest, spans = hashlib.sha256(), []
    start, position, row, rows = 0, 0, 1, 0
    with open(path, "rb") as file:
        while block := file.read(min(BLOCK, target)):
            while block.endswith(b"\r") and (more := file.read(1)):  # CRLF is one line end
                block += more
            digest.update(block)
            cut = block.rfind(b"\n") + 1
            if position + len(block) - start >= target and cut:
                stop = position + cut
                rows += _line_ends(block[:cut])
                spans.append(InputSpan(source, start, stop, row, stop - start))
                start, row, rows = stop, row + rows, _line_ends(block[cut:])
            else:
                rows += _line_ends(block)
            position += len(block)
    if position > start:
        spans.append(InputSpan(source, start, position, row, position - start))
    return Scan(digest.hexdigest(), spans)


def _line_ends(block: bytes) -> int:
    returns = block.count(b"\r")
    return block.count(b"\n") + (returns and returns - block.count(b"\r\n"))


def read(path: str, span: InputSpan, fields: Sequence[str]) -> Iterator[RawRecord]:
    """The rows of a span, good and bad, in order.

    Args:
        fields: whose values make a row's text, joined by line breaks.
    """
    texts = [_text_file(path)] if path.endswith(".txt") else _texts(path, span, fields)
    for number, text, problem in texts:
        yield RawRecord(span.source, number, text, problem or ("has no text" if not text or text.isspace() else ""))


def _text_file(path: str) -> tuple[int, str, str]:
    try:
        return 1, Path(path).read_bytes().decode("utf-8-sig"), ""
    except UnicodeDecodeError as error:
        return 1, "", f"is not UTF-8 at byte {error.start}"


def _texts(path: str, span: InputSpan, fields: Sequence[str]) -> Iterator[tuple[int, str, str]]:
    """Number, text and problem of each row."""
    if path.endswith(".parquet"):
        rows = _read_row_groups(path, span, fields)
    elif _has_lines(path):
        rows = json_rows(_lines(path, span), span.first_row)
    else:
        rows = numbered_rows(Path(path))
    for number, content in rows:
        yield number, *_text_of(content, fields)


def _lines(path: str, span: InputSpan) -> Iterator[bytes]:
    with open(path, "rb") as file:
        file.seek(span.start)
        left = span.size
        while left > 0:
            line = file.readline()
            if not line:
                raise DataError(f"{path}: became shorter since it was scanned")
            begins_file = span.start == 0 and left == span.size
            left -= len(line)
            yield line.removeprefix(codecs.BOM_UTF8) if begins_file else line


def _text_of(content: Any, fields: Sequence[str]) -> tuple[str, str]:
    try:
        row = as_object(content)
    except BadRow as error:
        return "", str(error)
    for name in fields:
        if not isinstance(row.get(name), str):
            return "", f"field {name} is {'not text' if name in row else 'missing'}"
    return "\n".join([row[name] for name in fields]), ""


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


def _read_row_groups(path: str, span: InputSpan, fields: Sequence[str]) -> Iterator[Numbered]:
    with _parquet(path) as file:
        columns = [name for name in fields if name in file.schema_arrow.names]
        groups = range(span.start, span.stop)
        if columns:
            batches = file.iter_batches(ROWS_AT_ONCE, row_groups=groups, columns=columns)
            contents: Iterable[Any] = table_rows(batches)
        else:
            contents = repeat({}, sum(file.metadata.row_group(index).num_rows for index in groups))
        yield from enumerate(contents, span.first_row)
