"""What a conversion writes: a Hugging Face folder in some format, or the files of a native checkpoint."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_r1.checkpoint.sharded import INDEX
from megatron_r1.checkpoint.tensor_file import Entry
from megatron_r1.errors import DataError
from megatron_r1.hf.fp8_blocks import SCALE_SUFFIX, StoredTensor, quantise_blocks
from megatron_r1.hf.param_mapping import ParamMapping
from megatron_r1.hf.plan import FORMATS, hf_entries, hf_file_name


class Target(Protocol):
    """A way to write tensors; a small value that can be sent to another process."""

    def entries(self, mapping: ParamMapping) -> list[Entry]:
        """What a parameter mapping becomes."""
        ...

    def encode(self, mapping: ParamMapping, parts: Sequence[StoredTensor]) -> dict[str, Tensor]:
        """The tensors of these entries by name, from the mapping's parts as Hugging Face divides them.

        Raises:
            DataError: the format has no place for the numbers.
        """
        ...

    def file_name(self, number: int, files: int) -> str: ...

    def header(self, entries: Sequence[Entry]) -> tuple[list[Entry], dict[str, str]]:
        """The same entries under their names in the file, and the file's metadata."""
        ...


@dataclass(frozen=True)
class FolderTarget:
    """A Hugging Face folder in one of FORMATS."""

    format: str

    def entries(self, mapping: ParamMapping) -> list[Entry]:
        return hf_entries(mapping, self.format)

    def encode(self, mapping: ParamMapping, parts: Sequence[StoredTensor]) -> dict[str, Tensor]:
        if self.format == "fp8" and mapping.quantised:
            return _quantised(mapping, parts)
        dtype = torch.float32 if mapping.float32 else FORMATS[self.format]
        tensors = {name: part.to(dtype) for name, part in zip(mapping.hf, parts, strict=True)}
        return tensors | dict.fromkeys(mapping.copies, tensors[mapping.hf[0]])

    def file_name(self, number: int, files: int) -> str:
        return hf_file_name(number, files)

    def header(self, entries: Sequence[Entry]) -> tuple[list[Entry], dict[str, str]]:
        return list(entries), {"format": "pt"}


@dataclass(frozen=True)
class NativeTarget:
    """Files of a native checkpoint, each as one rank's that has whole tensors."""

    precision: str
    kind: str = "model"

    def entries(self, mapping: ParamMapping) -> list[Entry]:
        return [Entry(mapping.native, self._dtype(mapping), mapping.native_shape)]

    def encode(self, mapping: ParamMapping, parts: Sequence[StoredTensor]) -> dict[str, Tensor]:
        return {mapping.native: mapping.join([part.to(self._dtype(mapping)) for part in parts])}

    def file_name(self, number: int, files: int) -> str:
        return f"{self.kind}-{number:05d}.safetensors"

    def header(self, entries: Sequence[Entry]) -> tuple[list[Entry], dict[str, str]]:
        numbered = [Entry(str(number), entry.dtype, entry.shape) for number, entry in enumerate(entries)]
        index = [[entry.name, entry.shape, (0,) * len(entry.shape)] for entry in entries]
        return numbered, {INDEX: json.dumps(index)}

    def _dtype(self, mapping: ParamMapping) -> torch.dtype:
        return torch.float32 if mapping.float32 else FORMATS[self.precision]


def _quantised(mapping: ParamMapping, parts: Sequence[StoredTensor]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, part in zip(mapping.hf, parts, strict=True):
        if part.scale_inv is None:
            try:
                part = quantise_blocks(part.weight)
            except ValueError as error:
                raise DataError(f"{name}: {error}") from error
        assert part.scale_inv is not None
        tensors |= {name: part.weight, name + SCALE_SUFFIX: part.scale_inv}
    return tensors
