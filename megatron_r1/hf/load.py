"""From a Hugging Face folder to megatron-core tensors: safetensors only, every tensor accounted for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from megatron_r1.checkpoint.tensor_file import Entry
from megatron_r1.config.model import ModelConfig
from megatron_r1.hf.folder import TensorFolder, refuse
from megatron_r1.hf.model_config import folder_format
from megatron_r1.hf.param_mapping import ParamMapping
from megatron_r1.hf.plan import FORMATS
from megatron_r1.hf.source import HuggingFaceReader, folder_problems, stored_mappings


class NativeTensors(Mapping[str, Tensor]):
    """The whole megatron-core tensors of a Hugging Face folder, each read on access.

    They have the folder's type; what is stored in FP8 is dequantised in fp32 and then cast to bf16.

    Raises:
        DataError: at once, when a file is damaged or missing, or a tensor is unknown, missing, doubled or of the wrong
            shape or type; on reading, when a scale is no positive number, or the embedding or head repeated in a
            multi-token layer differs from the first.
    """

    def __init__(self, folder: Path, model: ModelConfig, include_mtp: bool = True):
        format = folder_format(folder)
        tensors = TensorFolder(folder)
        refuse(folder, folder_problems(tensors, model, format, include_mtp))
        self._reader, self._dtype = HuggingFaceReader(tensors, format), FORMATS[format]
        self._mappings = {mapping.native: mapping for mapping in stored_mappings(tensors, model, include_mtp)}

    def __iter__(self) -> Iterator[str]:
        return iter(self._mappings)

    def __len__(self) -> int:
        return len(self._mappings)

    @property
    def entries(self) -> dict[str, Entry]:
        """Type and shape of every tensor by name; none is read."""
        return {
            name: Entry(name, self._type_of(mapping), tuple(mapping.native_shape))
            for name, mapping in self._mappings.items()
        }

    def _type_of(self, mapping: ParamMapping) -> torch.dtype:
        return torch.float32 if mapping.float32 else self._dtype

    def __getitem__(self, name: str) -> Tensor:
        mapping = self._mappings[name]
        dtype = self._type_of(mapping)
        return mapping.join([part.to(dtype) for part in self._reader.read(mapping).parts])
