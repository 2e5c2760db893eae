"""The local record of a run's metrics: one JSON object per line, one line per step.

A row is passed to the operating system before `append` returns. Steps increase from row to row, also after a resume. A
row that a crash left torn is dropped, never read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson

from megatron_r1.files import write_whole


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file, in order; a number that was not finite comes back as NaN; no file gives no rows."""
    return [parsed for _, parsed in _whole_rows(path)]


def _whole_rows(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Complete lines, which end in a newline and parse, with their content."""
    rows = []
    for line in path.read_bytes().splitlines(keepends=True) if path.is_file() else ():
        try:
            parsed = orjson.loads(line)
        except orjson.JSONDecodeError:
            continue
        if line.endswith(b"\n") and isinstance(parsed, dict) and isinstance(parsed.get("step"), int):
            # JSON has no NaN or infinity: they are written as null.
            rows.append((line, {key: math.nan if value is None else value for key, value in parsed.items()}))
    return rows


def _plain(value: Any) -> Any:
    """Scalars and arrays of other libraries, as Python numbers and lists."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is not a metric")


class Record:
    """Appends rows to a metrics file.

    Args:
        path: the file; its folder exists.
        resume_step: step from which the run resumes; later rows are removed. 0 starts a new file.
    """

    def __init__(self, path: Path, resume_step: int = 0):
        earlier = [(line, row["step"]) for line, row in _whole_rows(path) if 0 < resume_step >= row["step"]]
        self._last_step = earlier[-1][1] if earlier else -1
        write_whole(path, b"".join(line for line, _ in earlier))
        self._file = path.open("ab")

    def append(self, step: int, row: Mapping[str, Any]) -> None:
        """Writes one row.

        Raises:
            ValueError: `step` is not above the last one.
        """
        if step <= self._last_step:
            raise ValueError(f"step={step}: must be above {self._last_step}, the last step of the record")
        content = {"step": step} | {key: value for key, value in row.items() if key != "step"}
        self._file.write(orjson.dumps(content, default=_plain, option=orjson.OPT_APPEND_NEWLINE))
        self._file.flush()
        self._last_step = step

    def close(self) -> None:
        self._file.close()
