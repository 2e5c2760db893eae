"""Candidates on disk, written in the order of their rows and read in any other; of each, only its place is held."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import orjson

from megatron_r1.recipe.candidate import Candidate

_FIELDS = tuple(field.name for field in fields(Candidate))


class Spool:
    """A temporary file of candidates, which is removed at the end; 16 bytes of memory each."""

    def __init__(self, path: Path):
        self._path, self._file = path, path.open("w+b")
        self._rows, self._starts = array("q"), array("q")

    def add(self, row: int, candidate: Candidate) -> None:
        """Add a candidate; rows ascend."""
        self._rows.append(row)
        self._starts.append(self._file.tell())
        record = {name: getattr(candidate, name) for name in _FIELDS}
        self._file.write(orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE))

    def read(self, rows: Iterable[int]) -> Iterator[Candidate]:
        """The candidates of rows that were added, in the order of `rows`."""
        known = np.frombuffer(self._rows, dtype=np.int64) if self._rows else np.empty(0, dtype=np.int64)
        self._file.flush()
        for row in rows:
            self._file.seek(self._starts[int(np.searchsorted(known, row))])
            yield Candidate(**orjson.loads(self._file.readline()))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()
        self._path.unlink(missing_ok=True)
