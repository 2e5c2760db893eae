"""Named tensors on disk: one safetensors file per kind and rank inside a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

STATE_FILE = "state.json"


def write_tensors(folder: Path, kind: str, rank: int, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write this rank's tensors of one kind (``model``, ``optimizer``, ...)."""
    # Parameters are views of shared buffers; each is stored as a tensor of its own.
    save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors}, _file(folder, kind, rank))


def read_tensors(folder: Path, kind: str, rank: int) -> dict[str, Tensor]:
    """This rank's tensors of one kind, on the CPU; the checkpoint must have been verified before."""
    return load_file(_file(folder, kind, rank))


def has_tensors(folder: Path, kind: str, rank: int) -> bool:
    """Whether the checkpoint holds tensors of this kind."""
    return _file(folder, kind, rank).is_file()


def write_state(folder: Path, state: dict[str, Any]) -> None:
    """Write the plain values of a checkpoint."""
    (folder / STATE_FILE).write_text(json.dumps(state, indent=1, sort_keys=True))


def read_state(folder: Path) -> dict[str, Any]:
    """The plain values of a verified checkpoint."""
    return json.loads((folder / STATE_FILE).read_text())


def _file(folder: Path, kind: str, rank: int) -> Path:
    return folder / f"{kind}-{rank:05d}.safetensors"
