"""From a Hugging Face folder to megatron-core tensors: safetensors only, every tensor accounted for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_r1.config.model import ModelConfig
from megatron_r1.errors import ConfigError, DataError
from megatron_r1.hf.config import DTYPE_NAMES, read_json
from megatron_r1.hf.families import FAMILIES
from megatron_r1.hf.families.family import Family, read_rope
from megatron_r1.hf.names import expected_shapes, rows


def load_tensors(folder: Path, model: ModelConfig, include_mtp: bool = True) -> Iterator[tuple[str, Tensor]]:
    """Yield (native name, whole tensor on the CPU, in the stored type) for every tensor of `model`.

    All names and shapes are checked before the first tensor is read.

    Raises:
        DataError: a file is damaged or missing; a tensor is unknown, missing, doubled, of the wrong shape, or the
            embedding or head repeated in a multi-token layer differs from the first.
    """
    with ExitStack() as open_files:
        where = _index(folder, open_files)
        _check(folder, where, expected_shapes(model, include_mtp))
        for row in rows(model, include_mtp):
            parts = [where[name].get_tensor(name) for name in row.hf]
            tensor = row.join(parts)
            for copy in row.copies:
                if not torch.equal(tensor, where[copy].get_tensor(copy)):
                    raise DataError(f"{folder}: {copy} differs from {row.hf[0]}, which it repeats")
            yield row.native, tensor.float() if row.float32 else tensor


def model_config_from_hf(config_json: Path) -> ModelConfig:
    """The model that a config.json describes; what it does not say (loss weights, bias step) takes the defaults.

    Raises:
        DataError: a key is missing, or says something that this model does not have.
    """
    config = read_json(config_json)
    families = {family.model_type: family for family in FAMILIES}
    if (kind := config.get("model_type")) not in families:
        raise DataError(f"{config_json}: model_type={kind}: must be one of {', '.join(families)}")
    family = families[kind]
    for key, value in family.fixed.items():
        if config.get(key, value) != value:
            raise DataError(f"{config_json}: {key}={config[key]}: must be {value}")
    try:
        return _model_config(config, family)
    except KeyError as error:
        raise DataError(f"{config_json}: {error.args[0]} is missing") from error
    except (ConfigError, TypeError, ValueError) as error:
        raise DataError(f"{config_json}: {error}") from error


def _model_config(config: dict[str, Any], family: Family) -> ModelConfig:
    dtype = config.get("torch_dtype") or config["dtype"]
    precision = {name: precision for precision, name in DTYPE_NAMES.items()}.get(dtype)
    if precision is None:
        raise ValueError(f"torch_dtype={dtype}: must be one of {', '.join(DTYPE_NAMES.values())}")
    return ModelConfig(
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        num_attention_heads=config["num_attention_heads"],
        ffn_hidden_size=config["intermediate_size"],
        vocab_size=config["vocab_size"],
        max_sequence_length=config["max_position_embeddings"],
        norm_epsilon=config["rms_norm_eps"],
        init_std=config["initializer_range"],
        precision=precision,
        rope=read_rope(config),
        **family.sections(config),
    )


def _index(folder: Path, open_files: ExitStack) -> dict[str, Any]:
    """Open every safetensors file of `folder`; returns the open file that holds each tensor."""
    index = folder / "model.safetensors.index.json"
    listed: dict[str, str] = read_json(index)["weight_map"] if index.is_file() else {}
    where: dict[str, Any] = {}
    for file_name in sorted(set(listed.values())) or ["model.safetensors"]:
        if Path(file_name).name != file_name or not file_name.endswith(".safetensors"):
            raise DataError(f"{index}: {file_name}: must name a .safetensors file beside it")
        try:
            file = open_files.enter_context(safe_open(folder / file_name, framework="pt"))
        except (OSError, SafetensorError) as error:
            raise DataError(f"{folder / file_name}: cannot be read: {error}") from error
        for name in file.keys():  # noqa: SIM118 (no mapping)
            if name in where:
                raise DataError(f"{folder}: {name} is stored twice")
            if listed and listed.get(name) != file_name:
                raise DataError(f"{folder / file_name}: holds {name}, which the index does not place there")
            where[name] = file
    return where


def _check(folder: Path, where: dict[str, Any], expected: dict[str, tuple[int, ...]]) -> None:
    if unknown := where.keys() - expected.keys():
        raise DataError(f"{folder}: {min(unknown)}: no tensor of this model; unknown names in all: {len(unknown)}")
    if missing := expected.keys() - where.keys():
        raise DataError(f"{folder}: {min(missing)}: missing; tensors missing in all: {len(missing)}")
    for name, shape in expected.items():
        stored = tuple(where[name].get_slice(name).get_shape())
        if stored != shape:
            raise DataError(f"{folder}: {name}: has shape {stored}, must have {shape}")
