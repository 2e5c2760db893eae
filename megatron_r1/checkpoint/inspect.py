"""Lists the contents of a checkpoint and compares two checkpoints, one tensor at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_r1.checkpoint.manifest import MANIFEST_NAME
from megatron_r1.checkpoint.sharded import INDEX, WholeTensors
from megatron_r1.checkpoint.store import step_folders
from megatron_r1.checkpoint.tensor_file import TYPE_NAMES, Entry
from megatron_r1.errors import DataError

_PARTS_FILE = re.compile(r"(?P<kind>.+)-\d{5}\.safetensors")


def checkpoints_in(named: Path) -> list[Path]:
    """The checkpoints of a run's folder, the newest first; for a checkpoint's folder, that checkpoint.

    Raises:
        DataError: the folder is neither of the two.
    """
    if (named / MANIFEST_NAME).is_file():
        return [named]
    found = [path for _, path in step_folders(named / "checkpoints") + step_folders(named)]
    if not found:
        raise DataError(f"{named}: is neither a run with checkpoints nor a checkpoint")
    return found


def kinds(folder: Path) -> list[str]:
    """The kinds of sharded tensors in a checkpoint: ``model``, moments, ...; weights come first."""
    found = {
        match["kind"] for path in folder.iterdir() if (match := _PARTS_FILE.fullmatch(path.name)) and _shared(path)
    }
    return sorted(found, key=lambda kind: (kind != "model", kind))


def _shared(path: Path) -> bool:
    """Whether a file has parts of sharded tensors, not tensors of one rank alone."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return f'"{INDEX}"'.encode() in file.read(min(size, 1 << 16))


@dataclass(frozen=True, slots=True)
class Line:
    """An entry of a listing: a whole tensor, and the number of parts in which it is stored."""

    kind: str
    entry: Entry
    parts: int


def tensors(folder: Path) -> Iterator[Line]:
    """All sharded tensors of a checkpoint; reads headers only.

    Raises:
        DataError: a file was not written by a run.
    """
    for kind in kinds(folder):
        with WholeTensors(folder, kind) as whole:
            for name, entry in sorted(whole.entries.items()):
                yield Line(kind, entry, whole.parts(name))


@dataclass(frozen=True, slots=True)
class Values:
    """Statistics of a tensor."""

    smallest: float
    largest: float
    root_mean_square: float
    not_finite: int


def values(folder: Path, line: Line) -> Values:
    """Read one tensor and describe its finite numbers."""
    with WholeTensors(folder, line.kind) as whole:
        numbers_N = whole[line.entry.name].double().flatten()
    finite_N = numbers_N[numbers_N.isfinite()]
    if not len(finite_N):
        return Values(0.0, 0.0, 0.0, len(numbers_N))
    rms = finite_N.square().mean().sqrt()
    return Values(float(finite_N.min()), float(finite_N.max()), float(rms), len(numbers_N) - len(finite_N))


@dataclass(frozen=True, slots=True)
class Difference:
    """A tensor that is not the same in two checkpoints."""

    kind: str
    name: str
    what: str


def differences(first: Path, second: Path) -> Iterator[Difference]:
    """The tensors in which two checkpoints differ by at least a bit, whatever layouts wrote them."""
    ours, theirs = kinds(first), kinds(second)
    for kind in sorted({*ours, *theirs}):
        if kind not in ours or kind not in theirs:
            yield Difference(kind, "*", f"only in {first if kind in ours else second}")
            continue
        with WholeTensors(first, kind) as ones, WholeTensors(second, kind) as others:
            for name in sorted({*ones, *others}):
                if what := _difference(ones, others, name, first, second):
                    yield Difference(kind, name, what)


def _difference(ones: WholeTensors, others: WholeTensors, name: str, first: Path, second: Path) -> str:
    if name not in ones or name not in others:
        return f"only in {first if name in ones else second}"
    if (one := ones.entries[name]) != (other := others.entries[name]):
        return f"{shown(one)} and {shown(other)}"
    mine_N, its_N = (tensors[name].reshape(-1) for tensors in (ones, others))
    if torch.equal(mine_N.view(torch.uint8), its_N.view(torch.uint8)):
        return ""
    largest = float((mine_N.double() - its_N.double()).abs().max())
    return f"differs by at most {largest:.3g}"


def shown(entry: Entry) -> str:
    """Type and shape of a tensor."""
    return f"{TYPE_NAMES[entry.dtype]} {'x'.join(map(str, entry.shape)) or '-'}"
