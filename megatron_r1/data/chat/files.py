"""Reads rows of conversations from files: JSONL, Parquet, and folders of Hugging Face datasets.

A folder is what `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote, or a dataset's repository with JSONL or
Parquet files whose names begin with the split.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from megatron_r1.config.sft import ConversationsConfig
from megatron_r1.data.row_files import SUFFIXES, rows_of
from megatron_r1.errors import ConfigError, DataError


class RawRow(NamedTuple):
    """A row as the file holds it."""

    file: str
    number: int
    """Line of JSONL, or row of a table, from 1."""
    content: Any
    """The parsed row; a BadRow where it cannot be parsed."""


def files_of(config: ConversationsConfig, key: str) -> list[Path]:
    """The files of a source, in order.

    Args:
        key: configuration key to name in an error.

    Raises:
        ConfigError: the path holds no file that can be read.
        DataError: a folder is damaged.
    """
    path = Path(config.path)
    if path.is_dir():
        return _files_of_folder(path, config.split, key)
    if path.suffix not in SUFFIXES[:2]:
        raise ConfigError(f"{key}.path", path, "must be a .jsonl or .parquet file or a dataset's folder")
    if not path.is_file():
        raise ConfigError(f"{key}.path", path, "no such file")
    return [path]


def _files_of_folder(folder: Path, split: str, key: str) -> list[Path]:
    if (folder / "dataset_dict.json").is_file():
        splits = _json(folder / "dataset_dict.json").get("splits", [])
        if split not in splits:
            raise ConfigError(f"{key}.split", split, f"must be one of {', '.join(map(str, splits))}")
        folder = folder / Path(split).name
    if (folder / "state.json").is_file():
        named = [Path(str(entry.get("filename"))).name for entry in _json(folder / "state.json").get("_data_files", [])]
        files = [folder / name for name in named]
        if not files or not all(file.is_file() for file in files):
            raise DataError(f"{folder}: not all the files that state.json names are there")
        return files
    found = sorted(file for file in folder.rglob("*") if file.suffix in SUFFIXES[:2] and file.name.startswith(split))
    if not found:
        raise ConfigError(f"{key}.path", folder, f"must hold a saved dataset, or {split}*.jsonl or {split}*.parquet")
    return found


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: is not a JSON object")
    return content


def raw_rows(path: Path) -> Iterator[RawRow]:
    """All rows of a file.

    Raises:
        DataError: the file cannot be read.
    """
    for number, content in enumerate(rows_of(path), 1):
        yield RawRow(str(path), number, content)
