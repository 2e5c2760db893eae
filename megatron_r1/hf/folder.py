"""The tensors of a Hugging Face folder, each read when asked for into memory of its own.

safetensors checks the files; the reading is done here, because what safetensors gives is a view of a mapped file, and
the pages of a folder of hundreds of gigabytes would count as this process's memory for as long as it is open.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_r1.checkpoint.tensor_file import TYPE_NAMES, TYPES, Entry
from megatron_r1.errors import DataError
from megatron_r1.files import read_json
from megatron_r1.hf.model_config import INDEX_FILE, WEIGHTS_FILE


@dataclass(frozen=True, slots=True)
class TensorLocation:
    """Where a tensor lies."""

    entry: Entry
    path: Path
    start: int
    """Of its first byte in the file."""


class TensorFolder(Mapping[str, Tensor]):
    """Name -> tensor. Opening it reads headers only.

    Raises:
        DataError: a file is damaged or missing, or a tensor is there twice or not where the index says.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.locations: dict[str, TensorLocation] = {}
        index = folder / INDEX_FILE
        listed = _listed(index) if index.is_file() else {}
        _check_one_way_to_read(folder, listed)
        for file_name in sorted(set(listed.values())) or [WEIGHTS_FILE]:
            for location in read_header(folder / file_name):
                name = location.entry.name
                if name in self.locations:
                    raise DataError(f"{folder}: {name} is stored twice")
                if listed and listed.get(name) != file_name:
                    raise DataError(f"{folder / file_name}: holds {name}, which the index does not place there")
                self.locations[name] = location
        if absent := listed.keys() - self.locations.keys():
            raise DataError(f"{folder}: {min(absent)}: missing from {listed[min(absent)]}, where the index places it")

    def __iter__(self) -> Iterator[str]:
        return iter(self.locations)

    def __len__(self) -> int:
        return len(self.locations)

    def __getitem__(self, name: str) -> Tensor:
        location = self.locations[name]
        buffer = torch.empty(location.entry.nbytes, dtype=torch.uint8)
        view = memoryview(buffer.numpy()) if buffer.numel() else memoryview(b"")
        with location.path.open("rb", buffering=0) as file:
            file.seek(location.start)
            while view:
                if not (count := file.readinto(view)):
                    raise DataError(f"{location.path}: ends before {name}")
                view = view[count:]
        return buffer.view(location.entry.dtype).reshape(location.entry.shape)

    @property
    def entries(self) -> dict[str, Entry]:
        """What it holds, by name."""
        return {name: location.entry for name, location in self.locations.items()}


def _check_one_way_to_read(folder: Path, listed: Mapping[str, str]) -> None:
    whole = (folder / WEIGHTS_FILE).is_file()
    if listed and whole and WEIGHTS_FILE not in listed.values():
        raise DataError(f"{folder}: holds {WEIGHTS_FILE} and {INDEX_FILE} of other files: remove one of the two")
    if not (listed or whole):
        others = sorted(file.name for file in folder.glob("*.bin")) + sorted(
            f.name for f in folder.glob("*.safetensors")
        )
        found = f", only {others[0]}" if others else ""
        raise DataError(f"{folder}: cannot be read: holds neither {WEIGHTS_FILE} nor {INDEX_FILE}{found}")


def _listed(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise DataError(f"{index}: weight_map must say which file holds each tensor")
    for file_name in sorted(set(weight_map.values())):
        if Path(file_name).name != file_name or not file_name.endswith(".safetensors"):
            raise DataError(f"{index}: {file_name}: must name a .safetensors file beside it")
    return weight_map


def read_header(path: Path) -> list[TensorLocation]:
    """What a safetensors file holds, in its order.

    Raises:
        DataError: the file is damaged, names a tensor twice or has a type that no model here has.
    """
    try:
        with safe_open(path, framework="pt"):
            pass  # its length, its header and the locations of its tensors fit one another
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length), object_pairs_hook=_unrepeated)
    except (OSError, SafetensorError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    header.pop("__metadata__", None)
    locations = []
    for name, fields in header.items():
        if fields["dtype"] not in TYPES:
            raise DataError(f"{path}: {name}: has type {fields['dtype']}, must be one of {', '.join(TYPES)}")
        entry = Entry(name, TYPES[fields["dtype"]], tuple(fields["shape"]))
        locations.append(TensorLocation(entry, path, 8 + length + fields["data_offsets"][0]))
    return sorted(locations, key=lambda location: location.start)


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if repeated := {name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else set():
        raise ValueError(f"{min(repeated)} is stored twice")
    return dict(pairs)


def problems(wanted: Iterable[Entry], found: Mapping[str, Entry], also: Mapping[str, torch.dtype]) -> list[str]:
    """What is not as it must be, the worst first: unknown names, then missing ones, then wrong shapes and types.

    Args:
        wanted: what must be there, and nothing else.
        found: what is there.
        also: names of tensors that may have this other type.
    """
    by_name = {entry.name: entry for entry in wanted}
    unknown = [f"{name}: no tensor of this model" for name in sorted(found.keys() - by_name.keys())]
    missing = [f"{name}: missing" for name in sorted(by_name.keys() - found.keys())]
    wrong = []
    for name in (name for name in by_name if name in found):
        here, must = found[name], by_name[name]
        if here.shape != must.shape:
            wrong.append(f"{name}: has shape {here.shape}, must have {must.shape}")
        elif here.dtype not in (must.dtype, also.get(name)):
            wrong.append(f"{name}: has type {TYPE_NAMES[here.dtype]}, must have {TYPE_NAMES[must.dtype]}")
    return [*unknown, *missing, *wrong]


def refuse(where: Path, found: list[str]) -> None:
    """
    Raises:
        DataError: there are problems; names the first and how many there are.
    """
    if found:
        more = f"; problems in all: {len(found)}" if len(found) > 1 else ""
        raise DataError(f"{where}: {found[0]}{more}")
