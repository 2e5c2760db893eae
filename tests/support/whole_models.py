"""Whole models by name: the shapes of their tensors on either side, and their way to a Hugging Face folder and back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from megatron_r1.config.model import ModelConfig
from megatron_r1.hf.config import SpecialTokens, generation_config, hf_config, special_tokens
from megatron_r1.hf.export import SHARD_BYTES, hf_tensors, write_folder
from megatron_r1.hf.families import param_mappings
from megatron_r1.hf.load import NativeTensors
from megatron_r1.hf.param_mapping import Shape
from megatron_r1.hf.plan import FORMATS


def native_shapes(model: ModelConfig, include_mtp: bool = True) -> dict[str, Shape]:
    """Shape of every megatron-core tensor by name, for one tensor-parallel rank."""
    return {mapping.native: mapping.native_shape for mapping in param_mappings(model, include_mtp)}


def expected_shapes(model: ModelConfig, include_mtp: bool = True) -> dict[str, Shape]:
    """Shape of every Hugging Face tensor by name, with the copies in multi-token layers."""
    return {name: shape for mapping in param_mappings(model, include_mtp) for name, shape in mapping.hf_shapes.items()}


def export(
    tensors: Iterable[tuple[str, Tensor]],
    model: ModelConfig,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    include_mtp: bool = True,
    tokenizer_folder: Path | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write `folder` from whole (unsharded) megatron-core tensors in any order.

    Args:
        tensors: (native name, tensor) pairs. A yielded tensor must keep its values until `export` returns.
        model: shape of the model.
        folder: what to publish; an earlier export there is replaced.
        dtype: type of the written weights, by default as `model.dtype`; the router's bias is always float32.
        include_mtp: write the multi-token layers. Without, their tensors may be in `tensors` and are left out.
        tokenizer_folder: tokenizer files to copy; their special tokens go into config.json.
        shard_bytes: a file ends before it outgrows this; one file needs no index.

    Returns:
        `folder`.

    Raises:
        DataError: a tensor is unknown, missing, doubled or has the wrong shape; nothing is published.
        ConfigError: code of the model's family elsewhere would compute another model.
    """
    folder, dtype = Path(folder), dtype or FORMATS[model.dtype]
    tokens = special_tokens(tokenizer_folder) if tokenizer_folder else SpecialTokens()
    config = hf_config(model, tokens, str(dtype).removeprefix("torch."), include_mtp)
    named = hf_tensors(tensors, model, dtype=dtype, include_mtp=include_mtp)
    return write_folder(named, folder, config, generation_config(tokens), tokenizer_folder, shard_bytes)


def load_tensors(folder: Path, model: ModelConfig, include_mtp: bool = True) -> Iterator[tuple[str, Tensor]]:
    """Yield (native name, whole tensor on the CPU) for every tensor of `model`; see `NativeTensors`."""
    yield from NativeTensors(folder, model, include_mtp).items()
