"""From the tensors of a model in memory to a Hugging Face folder, published whole or not at all.

A stream of whole megatron-core tensors becomes safetensors shards, their index, config.json, generation_config.json,
tokenizer and chat template; for models on disk, of whatever size, there is conversion.py. Every tensor that the config
calls for is written once; anything else is an error.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_r1.checkpoint.tensor_file import write_tensor_file
from megatron_r1.config.model import ModelConfig
from megatron_r1.data.tokenizer import companions_of
from megatron_r1.errors import DataError
from megatron_r1.hf.config import (
    write_json,
)
from megatron_r1.hf.families import canonical_name, param_mappings
from megatron_r1.hf.plan import FORMATS, hf_file_name
from megatron_r1.hf.publish import published

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
SHARD_BYTES = 5_000_000_000


def write_folder(
    named: Iterable[tuple[str, Tensor]],
    folder: Path,
    config: dict[str, Any],
    generation: dict[str, Any],
    tokenizer_folder: Path | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write `folder` from tensors as they shall stand there, by their Hugging Face names.

    Args:
        named: (Hugging Face name, tensor) pairs.
        config: the content of config.json.
        generation: the content of generation_config.json.
        tokenizer_folder: tokenizer files to copy.
        shard_bytes: a file ends before it outgrows this; one file needs no index.
    """
    with published(folder) as unfinished:
        shards = _ShardWriter(unfinished, shard_bytes)
        for name, tensor in named:
            shards.add(name, tensor.to("cpu").contiguous())
        shards.close()
        write_companions(unfinished, config, generation, tokenizer_folder)
    return folder


def hf_tensors(
    tensors: Iterable[tuple[str, Tensor]],
    model: ModelConfig,
    *,
    dtype: torch.dtype | None = None,
    include_mtp: bool = True,
    complete: bool = True,
) -> Iterator[tuple[str, Tensor]]:
    """Whole megatron-core tensors, one by one, under Hugging Face's names and in its type; they stay on their device.

    Args:
        tensors: (native name, tensor) pairs in any order.
        model: shape of the model.
        dtype: type of the weights, by default as `model.dtype`; the router's bias is always float32.
        include_mtp: give the multi-token layers. Without, their tensors may be in `tensors` and are left out.
        complete: every tensor of the model must come; without, `tensors` may be a part of them.

    Raises:
        DataError: a tensor is unknown, missing, doubled or has the wrong shape. What is missing shows at the end.
    """
    dtype = dtype or FORMATS[model.dtype]
    table = {mapping.native: mapping for mapping in param_mappings(model)}
    written = {mapping.native: mapping for mapping in param_mappings(model, include_mtp)}
    met: set[str] = set()
    for name, tensor in tensors:
        native = canonical_name(name)
        if native not in table:
            raise DataError(f"{name}: no tensor of this model has that name")
        if native in met:
            raise DataError(f"{name}: given twice")
        if tuple(tensor.shape) != (shape := table[native].native_shape):
            raise DataError(f"{name}: has shape {tuple(tensor.shape)}, must have {shape}")
        met.add(native)
        if mapping := written.get(native):
            tensor = tensor.detach().to(torch.float32 if mapping.float32 else dtype)
            yield from zip(mapping.hf, mapping.split(tensor), strict=True)
            for copy in mapping.copies:
                yield copy, tensor.clone()  # safetensors refuses two names for one memory
        del tensor  # not held while the next is put together
    if complete and (missing := written.keys() - met):
        raise DataError(f"{min(missing)}: missing; tensors missing in all: {len(missing)}")


class _ShardWriter:
    """Writes tensors into files of at most `shard_bytes` (one tensor may be larger) and then their index."""

    def __init__(self, folder: Path, shard_bytes: int):
        self.folder, self.shard_bytes = folder, shard_bytes
        self.pending: dict[str, Tensor] = {}
        self.pending_bytes = self.total_bytes = 0
        self.files: list[tuple[Path, list[str]]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        if self.pending and self.pending_bytes + tensor.nbytes > self.shard_bytes:
            self._write()
        self.pending[name] = tensor
        self.pending_bytes += tensor.nbytes
        self.total_bytes += tensor.nbytes

    def close(self) -> None:
        """Write what is pending and name the files, whose number is only known now."""
        self._write()
        if len(self.files) == 1:
            self.files[0][0].rename(self.folder / "model.safetensors")
            return
        weight_map: dict[str, str] = {}
        for number, (file, names) in enumerate(self.files):
            final = hf_file_name(number, len(self.files))
            file.rename(self.folder / final)
            weight_map |= dict.fromkeys(names, final)
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(self.folder / "model.safetensors.index.json", index)

    def _write(self) -> None:
        file = self.folder / f"shard-{len(self.files)}"
        write_tensor_file(file, self.pending.items(), {"format": "pt"})
        self.files.append((file, list(self.pending)))
        self.pending, self.pending_bytes = {}, 0


def write_companions(
    folder: Path, config: dict[str, Any], generation: dict[str, Any], tokenizer_folder: Path | None
) -> None:
    """Write what stands beside the weights: config.json, generation_config.json and the tokenizer's files."""
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", generation)
    if tokenizer_folder:
        copy_tokenizer(tokenizer_folder, folder)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy those of the tokenizer's files and companions that are there; with none, `target` is not made."""
    own = [source / name for name in TOKENIZER_FILES if (source / name).is_file()]
    for path in [*own, *companions_of(source)]:
        copied = target / path.relative_to(source)
        copied.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copied)
