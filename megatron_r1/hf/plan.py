"""What a conversion will write, known from the model's shape alone: files, their tensors, the index.

Nothing here touches a tensor, so a plan is also the dry run, the list that a folder is held against before it is read,
and what several processes divide among themselves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from megatron_r1.checkpoint.tensor_file import TYPE_NAMES, Entry
from megatron_r1.config.model import DTYPE_NAMES
from megatron_r1.hf.fp8_blocks import FP8, SCALE_SUFFIX, scale_shape
from megatron_r1.hf.param_mapping import ParamMapping

FORMATS: dict[str, torch.dtype] = {dtype: getattr(torch, name) for dtype, name in DTYPE_NAMES.items()}
FORMATS["fp8"] = torch.bfloat16
"""Of a Hugging Face folder, with the type of what is not quantised."""


@dataclass(frozen=True, slots=True)
class FileSegment:
    """The tensors of one mapping that go into one file."""

    mapping: ParamMapping
    entries: tuple[Entry, ...]


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """A file to be written."""

    name: str
    segments: tuple[FileSegment, ...]

    @property
    def entries(self) -> list[Entry]:
        return [entry for segment in self.segments for entry in segment.entries]

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(entry.nbytes for entry in self.entries)


def hf_entries(mapping: ParamMapping, format: str, plain: torch.dtype | None = None) -> list[Entry]:
    """The Hugging Face tensors of a mapping in one of FORMATS, a weight before its scales.

    Args:
        plain: type of what is not quantised, by default the format's.
    """
    dtype = torch.float32 if mapping.float32 else plain or FORMATS[format]
    if format != "fp8" or not mapping.quantised:
        return [Entry(name, dtype, shape) for name, shape in mapping.hf_shapes.items()]
    entries: list[Entry] = []
    for name, shape in mapping.hf_shapes.items():
        entries += [Entry(name, FP8, shape), Entry(name + SCALE_SUFFIX, torch.float32, scale_shape(shape))]
    return entries


def plan_files(
    mappings: Iterable[ParamMapping],
    entries_of: Callable[[ParamMapping], Sequence[Entry]],
    shard_bytes: int,
    name_of: Callable[[int, int], str],
) -> list[PlannedFile]:
    """Divide the tensors of all mappings, in order, into files of at most `shard_bytes` (one tensor may be larger).

    Args:
        entries_of: the tensors that a mapping becomes.
        name_of: number of a file from 0, and how many there are -> its name.
    """
    files: list[list[FileSegment]] = [[]]
    filled = 0
    for mapping in mappings:
        here: list[Entry] = []
        for entry in entries_of(mapping):
            if filled and filled + entry.nbytes > shard_bytes:
                if here:
                    files[-1].append(FileSegment(mapping, tuple(here)))
                files.append([])
                here, filled = [], 0
            here.append(entry)
            filled += entry.nbytes
        files[-1].append(FileSegment(mapping, tuple(here)))
    return [PlannedFile(name_of(number, len(files)), tuple(segments)) for number, segments in enumerate(files)]


def hf_file_name(number: int, files: int) -> str:
    """As in the releases; a single file needs no index."""
    return f"model-{number + 1:05d}-of-{files:05d}.safetensors" if files > 1 else "model.safetensors"


def hf_index(files: Sequence[PlannedFile]) -> dict[str, Any]:
    """The content of model.safetensors.index.json."""
    weight_map = {entry.name: file.name for file in files for entry in file.entries}
    total = sum(file.nbytes for file in files)
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


@dataclass(frozen=True, slots=True)
class PlanTotals:
    """How much a plan is."""

    files: int
    tensors: int
    elements: int
    bytes_by_type: dict[str, int]
    """safetensors' name of a type -> bytes."""

    @property
    def nbytes(self) -> int:
        return sum(self.bytes_by_type.values())


def totals(files: Sequence[PlannedFile]) -> PlanTotals:
    """Count what a plan will write."""
    entries = [entry for file in files for entry in file.entries]
    by_type: Counter[str] = Counter()
    for entry in entries:
        by_type[TYPE_NAMES[entry.dtype]] += entry.nbytes
    return PlanTotals(len(files), len(entries), sum(prod(entry.shape) for entry in entries), dict(by_type))
