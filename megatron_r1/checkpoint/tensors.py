"""Named tensors on disk: one safetensors file per kind and rank inside a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from megatron_r1.checkpoint.manifest import FileRecord
from megatron_r1.checkpoint.tensor_file import write_tensor_file
from megatron_r1.errors import DataError
from megatron_r1.files import read_json

STATE_FILE = "state.json"


def write_tensors(folder: Path, kind: str, rank: int, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, FileRecord]:
    """Write this rank's tensors of one kind (``random``, ``extra``, ...); returns the file's name and record."""
    path = tensor_path(folder, kind, rank)
    return {path.name: write_tensor_file(path, tensors)}


def read_tensors(folder: Path, kind: str, rank: int) -> dict[str, Tensor]:
    """This rank's tensors of one kind, on the CPU; the checkpoint must have been verified before.

    Raises:
        DataError: the file was not written by `write_tensors`.
    """
    path = tensor_path(folder, kind, rank)
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None


def has_tensors(folder: Path, kind: str, rank: int) -> bool:
    """Whether the checkpoint has tensors of this kind."""
    return tensor_path(folder, kind, rank).is_file()


def write_state(folder: Path, state: dict[str, Any]) -> None:
    """Write the plain values of a checkpoint."""
    (folder / STATE_FILE).write_text(json.dumps(state, indent=1, sort_keys=True))


def read_state(folder: Path) -> dict[str, Any]:
    """The plain values of a verified checkpoint.

    Raises:
        DataError: the file was not written by `write_state`.
    """
    return read_json(folder / STATE_FILE)


def tensor_path(folder: Path, kind: str, rank: int) -> Path:
    """Path of a rank's tensors of one kind."""
    return folder / f"{kind}-{rank:05d}.safetensors"
