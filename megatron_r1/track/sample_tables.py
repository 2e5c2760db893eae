"""Small tables of sampled responses, one for each of some steps, in a run's folder, from where wandb gets them again
when the run resumes.

    RUN/tables/step-00000050.jsonl    a response a line
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

from megatron_r1.files import write_whole

FOLDER = "tables"
_NAME = re.compile(r"step-(\d{8,})\.jsonl")
Rows = Sequence[Mapping[str, Any]]


def write_table(run_folder: Path, step: int, rows: Rows) -> None:
    """Write the table of a step."""
    folder = run_folder / FOLDER
    folder.mkdir(exist_ok=True)
    content = b"".join(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in rows)
    write_whole(folder / f"step-{step:08}.jsonl", content)


def read_tables(run_folder: Path, last_step: int) -> list[list[dict[str, Any]]]:
    """The tables up to a step, in order; removes those of later steps, which are made again."""
    found = []
    for path in sorted((run_folder / FOLDER).glob("*.jsonl")):
        if not (match := _NAME.fullmatch(path.name)):
            continue
        if int(match[1]) > last_step:
            path.unlink()
        else:
            found.append([orjson.loads(line) for line in path.read_bytes().splitlines()])
    return found
