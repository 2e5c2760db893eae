"""Where a model's tensors are read from: a native checkpoint or a Hugging Face folder, behind one interface.

A source is a small value that can be sent to another process. Opened, it reads the tensors of one parameter mapping
at a time, as Hugging Face divides them, and says which stored tensors they come from.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Container, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from megatron_r1.checkpoint.manifest import MANIFEST_NAME
from megatron_r1.checkpoint.sharded import WholeTensors
from megatron_r1.checkpoint.tensor_file import Entry
from megatron_r1.config.model import ModelConfig
from megatron_r1.errors import DataError
from megatron_r1.files import canonical_json
from megatron_r1.hf.families import canonical_name, param_mappings
from megatron_r1.hf.folder import TensorFolder, problems
from megatron_r1.hf.fp8_blocks import SCALE_SUFFIX, StoredTensor
from megatron_r1.hf.model_config import EMBEDDING, HEAD, INDEX_FILE
from megatron_r1.hf.param_mapping import ParamMapping
from megatron_r1.hf.plan import FORMATS, hf_entries

_DERIVED = ".rotary_emb.inv_freq"
"""Frequencies that older folders store beside the weights; config.json gives them."""


class TensorRead(NamedTuple):
    """The tensors of one parameter mapping."""

    parts: list[StoredTensor]
    """As Hugging Face divides them."""
    source: dict[str, Tensor]
    """The stored tensors that they were read from, by the source's own names."""


class Reader(Protocol):
    """An open source."""

    def read(self, mapping: ParamMapping) -> TensorRead:
        """
        Raises:
            DataError: the numbers are not what the source says they are.
        """
        ...


class Source(Protocol):
    """Where tensors are."""

    @property
    def model(self) -> ModelConfig:
        """Shape of what is there."""
        ...

    def mappings(self) -> list[ParamMapping]:
        """What `Reader.read` takes."""
        ...

    def open(self) -> AbstractContextManager[Reader]: ...

    def fingerprint(self) -> Any:
        """A JSON value that changes whenever what is read may have."""
        ...


@dataclass(frozen=True)
class NativeSource:
    """Whole tensors of one kind in a verified checkpoint."""

    folder: Path
    model: ModelConfig
    kind: str = "model"

    def mappings(self) -> list[ParamMapping]:
        return param_mappings(self.model)

    @contextmanager
    def open(self) -> Iterator[Reader]:
        with WholeTensors(self.folder, self.kind) as tensors:
            yield _CheckpointReader(tensors)

    def problems(self) -> list[str]:
        """What the checkpoint lacks or has too much or in the wrong shape or type; reads headers only."""
        with WholeTensors(self.folder, self.kind) as tensors:
            entries = tensors.entries
        found: dict[str, Entry] = {}
        twice = []
        for name, entry in entries.items():
            if canonical_name(name) in found:
                twice.append(f"{name}: given twice, by an old name and a new one")
            found[canonical_name(name)] = entry
        wanted = [Entry(mapping.native, torch.float32, mapping.native_shape) for mapping in param_mappings(self.model)]
        return twice + problems(
            wanted, found, {mapping.native: torch.bfloat16 for mapping in param_mappings(self.model)}
        )

    def fingerprint(self) -> Any:
        manifest = (self.folder / MANIFEST_NAME).read_bytes()
        return ["native", self.kind, hashlib.sha256(manifest).hexdigest()]


class _CheckpointReader:
    def __init__(self, tensors: WholeTensors):
        self._tensors = tensors
        self._names = {canonical_name(name): name for name in tensors}

    def read(self, mapping: ParamMapping) -> TensorRead:
        name = self._names[mapping.native]
        tensor = self._tensors[name]
        return TensorRead([StoredTensor(part) for part in mapping.split(tensor)], {name: tensor})


@dataclass(frozen=True)
class FolderSource:
    """A Hugging Face folder, in one of FORMATS."""

    folder: Path
    model: ModelConfig
    format: str

    def mappings(self) -> list[ParamMapping]:
        return stored_mappings(TensorFolder(self.folder), self.model)

    @contextmanager
    def open(self) -> Iterator[HuggingFaceReader]:
        yield HuggingFaceReader(TensorFolder(self.folder), self.format)

    def problems(self) -> list[str]:
        """What the folder lacks or has too much or in the wrong shape or type; reads headers only.

        Raises:
            DataError: a file is damaged or missing, or a tensor is stored twice.
        """
        return folder_problems(TensorFolder(self.folder), self.model, self.format)

    def check_scales(self) -> None:
        """Read all scales, which are a few numbers in ten thousand, before hours go into the rest.

        Raises:
            DataError: a scale is no positive number.
        """
        folder = TensorFolder(self.folder)
        for name in folder:
            if name.endswith(SCALE_SUFFIX):
                _scale(folder, name)

    def fingerprint(self) -> Any:
        paths = [self.folder / "config.json", self.folder / INDEX_FILE, *sorted(self.folder.glob("*.safetensors"))]
        stats = [(path.name, path.stat()) for path in paths if path.exists()]
        return ["hf", self.format, [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]]


class HuggingFaceReader:
    """Reads the tensors of a folder whose headers were found to be right."""

    def __init__(self, folder: TensorFolder, format: str):
        self._folder, self._fp8 = folder, format == "fp8"

    def read(self, mapping: ParamMapping) -> TensorRead:
        source: dict[str, Tensor] = {}
        parts = []
        for name in mapping.hf:
            source[name] = self._folder[name]
            scale = None
            if self._fp8 and mapping.quantised:
                scale = source[name + SCALE_SUFFIX] = _scale(self._folder, name + SCALE_SUFFIX)
            parts.append(StoredTensor(source[name], scale))
        for name in mapping.copies:
            source[name] = self._folder[name]
            if not torch.equal(source[name], source[mapping.hf[0]]):
                hint = ": tie_word_embeddings in config.json must be false" if name == HEAD else ""
                raise DataError(f"{self._folder.folder}: {name} differs from {mapping.hf[0]}, which it repeats{hint}")
        return TensorRead(parts, source)


def stored_mappings(names: Container[str], model: ModelConfig, include_mtp: bool = True) -> list[ParamMapping]:
    """As `param_mappings`; where the embedding is the head, a head that the folder stores repeats it.

    Args:
        names: of the stored tensors.
    """
    table = param_mappings(model, include_mtp)
    if not model.tied_embeddings or HEAD not in names:
        return table
    return [
        replace(mapping, copies=(*mapping.copies, HEAD)) if EMBEDDING in mapping.hf else mapping for mapping in table
    ]


def folder_problems(folder: TensorFolder, model: ModelConfig, format: str, include_mtp: bool = True) -> list[str]:
    """What a folder lacks or has too much or in the wrong shape or type."""
    table = stored_mappings(folder, model, include_mtp)
    expected = [entry for mapping in table for entry in hf_entries(mapping, format)]
    # transformers casts the balancing bias with the rest of a model that is cast.
    also = {name: FORMATS[format] for mapping in table if mapping.float32 for name in mapping.hf}
    found = {name: entry for name, entry in folder.entries.items() if not name.endswith(_DERIVED)}
    return [f"{problem}{_likely_cause(problem, model)}" for problem in problems(expected, found, also)]


def _likely_cause(problem: str, model: ModelConfig) -> str:
    """The key of config.json that is probably wrong where this tensor is missing or unknown; empty otherwise."""
    if problem == f"{HEAD}: missing":
        return ", which tie_word_embeddings=true in config.json would explain"
    extra = re.match(r"model\.layers\.(\d+)\.\S+ no tensor", problem)
    if extra and int(extra[1]) >= model.num_layers + model.mtp.num_layers:
        return ", which num_hidden_layers or num_nextn_predict_layers in config.json would explain"
    return ""


def digest_of_value(value: Any) -> str:
    """SHA-256 of a JSON value."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def _scale(folder: TensorFolder, name: str) -> Tensor:
    scale = folder[name]
    if not bool((scale.isfinite() & (scale > 0)).all()):
        raise DataError(f"{folder.folder}: {name}: holds {_strangest(scale)}, must hold finite numbers above 0")
    return scale


def _strangest(scale: Tensor) -> float:
    return float(scale[~(scale.isfinite() & (scale > 0))][0])
