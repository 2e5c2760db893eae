"""Reads rows from one file: JSON Lines or a JSON array, plain or gzipped, Parquet, Arrow and CSV.

Whatever rows are for, they are read here and so by one rule: a byte order mark is no part of the first row, a blank
line is no row, and a line ends in LF, CRLF or CR. Tables need pyarrow, not `datasets`. Every value of CSV is text.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import orjson

from megatron_r1.errors import DataError

ROWS_AT_ONCE = 1024
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
SUFFIXES = (*JSON_SUFFIXES, ".parquet", ".arrow", ".csv")
FORMATS = f"{', '.join(SUFFIXES)}, or of JSON its .gz"
GZIPPED, ARROW_FILE = b"\x1f\x8b", b"ARROW1"
JSON_TYPE = "arrow.json"
POINTER = b"version https://git-lfs"
OTHER_ENCODINGS = {codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16", codecs.BOM_UTF32_BE: "UTF-32"}


class BadRow(ValueError):
    """Why a row cannot be used."""


class Row(NamedTuple):
    """A row as its file holds it."""

    location: str
    """file:row; rows are lines of JSON Lines, items of an array or rows of a table, from 1."""
    id: str
    """Unique: the number of the row; of several files, the file's path in their folder and the number."""
    content: Any
    """The parsed row; a BadRow where it cannot be parsed."""


Numbered = tuple[int, Any]
"""The number of a row, from 1, and its content."""


def as_object(content: Any) -> dict[str, Any]:
    """The content of a row with named fields.

    Raises:
        BadRow: it could not be parsed, or it has none.
    """
    if isinstance(content, BadRow):
        raise content
    if not isinstance(content, dict):
        raise BadRow("is not a JSON object")
    return content


def refuse_fields(fields: Mapping[str, Any], names: Iterable[str], where: str = "") -> None:
    """Refuse fields that nothing reads though they change what the rest means; None and empty values say nothing.

    Raises:
        BadRow: names the first of `names` that has a value.
    """
    for name in names:
        if fields.get(name):
            raise BadRow(f"{where}has {name}, which nothing reads")


TOOL_FIELDS = ("tools", "functions", "tool_calls", "function_call", "tool_call_id")
MEDIA_FIELDS = ("images", "image", "videos", "audios")
PROMPT_FIELDS = ("input", "context", "history")
"""Fields of instruction datasets that belong to the prompt, beside the one that is configured."""


def suffix_of(path: Path) -> str:
    """Suffix that names a file's format, without the .gz of a gzipped one: `.jsonl` of `train.jsonl.gz`."""
    return (path.with_suffix("") if path.suffix == ".gz" else path).suffix


def is_row_file(path: Path) -> bool:
    """Whether the name of a file is one of a format that can be read."""
    return suffix_of(path) in (JSON_SUFFIXES if path.suffix == ".gz" else SUFFIXES)


def rows_of(files: Sequence[Path]) -> Iterator[Row]:
    """All rows of files, in order, with a BadRow for each that cannot be parsed.

    Raises:
        DataError: a file cannot be read.
    """
    folder = os.path.commonpath([file.parent for file in files]) if len(files) > 1 else ""
    for file in files:
        prefix = f"{file.relative_to(folder).as_posix()}:" if folder else ""
        for number, content in numbered_rows(file):
            yield Row(f"{file}:{number}", f"{prefix}{number}", content)


def numbered_rows(path: Path) -> Iterator[Numbered]:
    """The rows of one file; raises as `rows_of`."""
    read = {".parquet": _parquet, ".arrow": _arrow, ".csv": _csv}.get(suffix_of(path), _json)
    try:
        yield from read(path)
    except (EOFError, zlib.error) as error:
        raise DataError(f"{path}: is not a whole gzip file ({error})") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def open_text(path: Path) -> BinaryIO:
    """Open a file of UTF-8 text, unpacked where it is gzipped, behind its byte order mark.

    Raises:
        DataError: the file is of another encoding, or a pointer to a file that Git LFS has not fetched.
    """
    file: Any = path.open("rb")
    if file.peek(2).startswith(GZIPPED):
        file.close()
        file = gzip.GzipFile(path)
    head = file.peek(64)
    problem = next((f"is {name}, not UTF-8" for mark, name in OTHER_ENCODINGS.items() if head.startswith(mark)), "")
    if head.startswith(POINTER):
        problem = "is a pointer of Git LFS; fetch the file itself with git lfs pull"
    if problem:
        file.close()
        raise DataError(f"{path}: {problem}")
    if head.startswith(codecs.BOM_UTF8):
        file.read(len(codecs.BOM_UTF8))
    return cast(BinaryIO, file)


def is_gzipped(file: BinaryIO) -> bool:
    """Whether the text that `open_text` opened is unpacked while it is read."""
    return isinstance(file, gzip.GzipFile)


def begins_as_array(file: BinaryIO) -> bool:
    """Whether the text that `open_text` opened begins as a JSON array does."""
    return _begin(file).startswith(b"[")


def _begin(file: Any) -> bytes:
    begin: bytes = file.peek(64)
    return begin.lstrip()


def json_rows(lines: Iterable[bytes], first: int = 1) -> Iterator[Numbered]:
    """The rows of JSON Lines.

    Args:
        lines: what a binary file yields; the first of them is line `first`.
    """
    number = first - 1
    for line in lines:
        # A lone CR ends a line too: JSON has none inside of strings.
        for part in line.splitlines() if b"\r" in line else (line,):
            number += 1
            try:
                row = orjson.loads(part)
            except orjson.JSONDecodeError as error:
                if part.strip():
                    yield number, BadRow(f"is not JSON ({error.msg})")
            else:
                yield number, json.loads(part) if _has_rounded(row) else row


def _has_rounded(row: Any) -> bool:
    """Whether a field may be an integer of more than 64 bits, of which orjson makes a float."""
    if isinstance(row, dict):
        for value in row.values():
            if type(value) is float and abs(value) >= 2**63:
                return True
    return False


def _json(path: Path) -> Iterator[Numbered]:
    with open_text(path) as file:
        if begins_as_array(file):
            rows: Iterable[Numbered] = enumerate(_array(path, file), 1)
        elif _begin(file).partition(b"\n")[0].strip() == b"{":
            raise DataError(f"{path}: holds an object over many lines; rows are one array, or one object a line")
        else:
            rows = json_rows(file)
        yield from rows


def _array(path: Path, file: BinaryIO) -> list[Any]:
    text = file.read()
    try:
        items = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise DataError(f"{path}: begins as a JSON array and is no whole one ({error})") from error
    return cast(list[Any], json.loads(text)) if any(map(_has_rounded, items)) else items


def _parquet(path: Path) -> Iterator[Numbered]:
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            yield from _numbered(file.iter_batches(ROWS_AT_ONCE))
    except ValueError as error:  # pyarrow's own errors derive from it
        raise DataError(
            f"{path}: is not a Parquet file, or is not a whole one ({' '.join(str(error).split())})"
        ) from error


def _arrow(path: Path) -> Iterator[Numbered]:
    from pyarrow import ipc, memory_map

    try:
        with memory_map(str(path)) as file:
            if file.read(len(ARROW_FILE)) == ARROW_FILE:
                with ipc.open_file(file) as table:
                    yield from _numbered(table.get_batch(index) for index in range(table.num_record_batches))
            else:
                file.seek(0)
                with ipc.open_stream(file) as stream:
                    yield from _numbered(stream)
    except ValueError as error:
        raise DataError(
            f"{path}: is not an Arrow file, or is not a whole one ({' '.join(str(error).split())})"
        ) from error


def _csv(path: Path) -> Iterator[Numbered]:
    """Rows below a header that names the fields; a quoted value may have line ends, so rows are counted, not lines."""
    with io.TextIOWrapper(open_text(path), encoding="utf-8", newline="") as file:
        try:
            rows = csv.reader(file, strict=True)
            header = next(rows, [])
            if not all(header) or len(set(header)) < len(header):
                raise DataError(f"{path}: its first row must name every field, each once")
            for number, values in enumerate((row for row in rows if row), 1):
                if len(values) == len(header):
                    yield number, dict(zip(header, values, strict=True))
                else:
                    yield number, BadRow(f"has {len(values)} values for {len(header)} fields")
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{path}: is no CSV file in UTF-8, or is no whole one ({error})") from error


def _numbered(batches: Iterable[Any]) -> Iterator[Numbered]:
    yield from enumerate(table_rows(batches), 1)


def table_rows(batches: Iterable[Any]) -> Iterator[Any]:
    """The rows of Arrow's record batches; parses the JSON texts that `datasets` makes of columns of mixed types."""
    for batch in batches:
        fields = [field for field in batch.schema if _holds_json(field.type)]
        for row in batch.to_pylist():
            yield row | {field.name: _with_json(row[field.name], field.type) for field in fields} if fields else row


def _holds_json(kind: Any) -> bool:
    inner = (kind.field(index).type for index in range(kind.num_fields))
    return getattr(kind, "extension_name", "") == JSON_TYPE or any(map(_holds_json, inner))


def _with_json(value: Any, kind: Any) -> Any:
    if value is None:
        return None
    if getattr(kind, "extension_name", "") == JSON_TYPE:
        return orjson.loads(value)
    if isinstance(value, dict):
        return {field.name: _with_json(value[field.name], field.type) for field in kind}
    if isinstance(value, list) and hasattr(kind, "value_type"):
        return [_with_json(item, kind.value_type) for item in value]
    return value
