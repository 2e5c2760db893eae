"""Reads rows from JSONL, Parquet and Arrow files, one after the other. Tables need pyarrow, not `datasets`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

from megatron_r1.errors import DataError

ROWS_AT_ONCE = 1024
SUFFIXES = (".jsonl", ".parquet", ".arrow")


class BadRow(ValueError):
    """Why a row cannot be used."""


class EmptyRow(BadRow):
    """A line of JSONL that holds nothing but white space."""


def rows_of(path: Path) -> Iterator[Any]:
    """All rows of a file, with a BadRow for each that cannot be parsed; without the suffix of a table, a file is JSONL.

    Raises:
        DataError: the file cannot be read.
    """
    read = {".parquet": _parquet, ".arrow": _arrow}.get(path.suffix, _lines)
    try:
        yield from read(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def _lines(path: Path) -> Iterator[Any]:
    with path.open("rb") as file:
        for line in file:
            try:
                yield orjson.loads(line)
            except orjson.JSONDecodeError as error:
                yield EmptyRow("is empty") if line.isspace() else BadRow(f"is not JSON ({error.msg})")


def _parquet(path: Path) -> Iterator[Any]:
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(ROWS_AT_ONCE):
                yield from batch.to_pylist()
    except ValueError as error:  # pyarrow's own errors derive from it
        raise DataError(
            f"{path}: is not a Parquet file, or is not a whole one ({' '.join(str(error).split())})"
        ) from error


def _arrow(path: Path) -> Iterator[Any]:
    from pyarrow import ipc, memory_map

    try:
        with memory_map(str(path)) as file, ipc.open_stream(file) as reader:
            for batch in reader:
                yield from batch.to_pylist()
    except ValueError as error:
        raise DataError(
            f"{path}: is not an Arrow file, or is not a whole one ({' '.join(str(error).split())})"
        ) from error
