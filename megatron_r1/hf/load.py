"""From a Hugging Face folder to megatron-core tensors: safetensors only, every tensor accounted for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_r1.config.model import ModelConfig
from megatron_r1.errors import ConfigError, DataError
from megatron_r1.hf.config import format_of, read_json
from megatron_r1.hf.families import FAMILIES, param_mappings
from megatron_r1.hf.families.family import Family, read_rope
from megatron_r1.hf.folder import TensorFolder, refuse
from megatron_r1.hf.plan import FORMATS
from megatron_r1.hf.source import HuggingFaceReader, folder_problems


class NativeTensors(Mapping[str, Tensor]):
    """The whole megatron-core tensors of a Hugging Face folder, each read on access.

    They have the folder's type; what is stored in FP8 is dequantised in fp32 and then cast to bf16.

    Raises:
        DataError: at once, when a file is damaged or missing, or a tensor is unknown, missing, doubled or of the wrong
            shape or type; on reading, when a scale is no positive number, or the embedding or head repeated in a
            multi-token layer differs from the first.
    """

    def __init__(self, folder: Path, model: ModelConfig, include_mtp: bool = True):
        format = folder_format(folder / "config.json")
        tensors = TensorFolder(folder)
        refuse(folder, folder_problems(tensors, model, format, include_mtp))
        self._reader, self._dtype = HuggingFaceReader(tensors, format), FORMATS[format]
        self._mappings = {mapping.native: mapping for mapping in param_mappings(model, include_mtp)}

    def __iter__(self) -> Iterator[str]:
        return iter(self._mappings)

    def __len__(self) -> int:
        return len(self._mappings)

    def __getitem__(self, name: str) -> Tensor:
        mapping = self._mappings[name]
        dtype = torch.float32 if mapping.float32 else self._dtype
        return mapping.join([part.to(dtype) for part in self._reader.read(mapping).parts])


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
    format = format_of(config)
    return ModelConfig(
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        num_attention_heads=config["num_attention_heads"],
        ffn_hidden_size=config["intermediate_size"],
        vocab_size=config["vocab_size"],
        max_sequence_length=config["max_position_embeddings"],
        norm_epsilon=config["rms_norm_eps"],
        init_std=config["initializer_range"],
        dtype="bf16" if format == "fp8" else format,
        rope=read_rope(config),
        **family.sections(config),
    )


def folder_format(config_json: Path) -> str:
    """The format of the folder's weights by its config.json: fp32, bf16 or fp8.

    Raises:
        DataError: it names none of these, or no type at all.
    """
    try:
        return format_of(read_json(config_json))
    except KeyError as error:
        raise DataError(f"{config_json}: {error.args[0]} is missing") from error
    except ValueError as error:
        raise DataError(f"{config_json}: {error}") from error
