"""The model that a Hugging Face folder holds, by its config.json; read without torch, before a command starts."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any

from megatron_r1.config.model import DTYPE_NAMES, ModelConfig
from megatron_r1.errors import ConfigError, DataError
from megatron_r1.files import read_json
from megatron_r1.hf.config import format_of
from megatron_r1.hf.families import FAMILIES
from megatron_r1.hf.families.family import Family, read_rope

logger = logging.getLogger(__name__)

CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE = "config.json", "model.safetensors.index.json", "model.safetensors"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_STORED_TYPES = {"F32": DTYPE_NAMES["fp32"], "BF16": DTYPE_NAMES["bf16"]}
"""safetensors' name of a type -> that of config.json."""
MTP_KEYS = ("num_nextn_predict_layers", "num_mtp_layers")
"""Keys of config.json for the number of multi-token layers: the releases', and one that transformers reads too."""


def model_of_folder(folder: Path) -> ModelConfig:
    """The model that a folder holds; raises as `read_folder_config` and `model_of_config`."""
    said, config = read_json(folder / CONFIG_FILE), read_folder_config(folder)
    for key in MTP_KEYS:
        if config.get(key) != said.get(key):
            text = "%s: %s=%s, but the folder stores %s such layers; the model has these alone"
            logger.info(text, folder / CONFIG_FILE, key, said[key], config[key] or "no")
    return model_of_config(config, folder / CONFIG_FILE)


def read_folder_config(folder: Path) -> dict[str, Any]:
    """config.json, corrected by what the folder's files hold.

    transformers saves a model without the multi-token layers that config.json names, and the type of weights is there
    whether config.json names it or not.

    Raises:
        DataError: config.json cannot be read.
    """
    config = read_json(folder / CONFIG_FILE)
    names = stored_names(folder)
    for key in MTP_KEYS:
        layers, depths = config.get("num_hidden_layers"), config.get(key)
        if isinstance(depths, int) and isinstance(layers, int):
            config[key] = next((d for d in range(depths) if not _holds_layer(names, layers + d)), depths)
    if not (config.get("torch_dtype") or config.get("dtype")) and (stored := _stored_type(folder)):
        config["torch_dtype"] = stored
    return config


def model_config_from_hf(config_json: Path) -> ModelConfig:
    """The model that a config.json describes, whatever is stored beside it; raises as `model_of_config`."""
    return model_of_config(read_json(config_json), config_json)


def model_of_config(config: dict[str, Any], config_json: Path) -> ModelConfig:
    """The model that the content of a config.json describes; a key that is null is as one that is not there.

    What it does not say (loss weights, bias step) takes the defaults.

    Args:
        config_json: where the content is from, for errors.

    Raises:
        DataError: a key is missing, or says something that this model does not have.
    """
    families = {family.model_type: family for family in FAMILIES}
    if (kind := config.get("model_type")) not in families:
        raise DataError(f"{config_json}: model_type={kind}: must be one of {', '.join(families)}")
    family = families[kind]
    if family.architecture not in (named := config.get("architectures") or [family.architecture]):
        raise DataError(f"{config_json}: architectures={named}: must be {family.architecture}")
    for key, value in (family.fixed | {"partial_rotary_factor": 1.0}).items():
        if config.get(key) not in (None, value):
            raise DataError(f"{config_json}: {key}={config[key]}: must be {value}")
    if others := set(config.get("layer_types") or ()) - {"full_attention"}:
        raise DataError(f"{config_json}: layer_types={min(others)}: must be full_attention in every layer")
    try:
        return _model_config(config, family)
    except KeyError as error:
        raise DataError(f"{config_json}: {error.args[0]} is missing") from error
    except (ConfigError, TypeError, ValueError) as error:
        raise DataError(f"{config_json}: {error}") from error


def _model_config(config: dict[str, Any], family: Family) -> ModelConfig:
    # Null has a meaning of its own for these two: no such part.
    none = {key: 0 for key in ("q_lora_rank", "n_shared_experts") if key in config and config[key] is None}
    config = {key: value for key, value in config.items() if value is not None} | none
    format = format_of(config)
    return ModelConfig(
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        num_attention_heads=config["num_attention_heads"],
        ffn_hidden_size=config["intermediate_size"],
        vocab_size=config["vocab_size"],
        max_sequence_length=config["max_position_embeddings"],
        norm_epsilon=config["rms_norm_eps"],
        init_std=config.get("initializer_range", 0.02),
        dtype="bf16" if format == "fp8" else format,
        rope=read_rope(config),
        **family.sections(config),
    )


def folder_format(folder: Path) -> str:
    """The format of a folder's weights: fp32, bf16 or fp8.

    Raises:
        DataError: it is none of these, or cannot be known.
    """
    try:
        return format_of(read_folder_config(folder))
    except KeyError as error:
        raise DataError(f"{folder / CONFIG_FILE}: {error.args[0]} is missing") from error
    except ValueError as error:
        raise DataError(f"{folder / CONFIG_FILE}: {error}") from error


def stored_names(folder: Path) -> Collection[str]:
    """Names of the tensors that a folder stores, by its index or the header of its one file; empty where damaged."""
    if (index := folder / INDEX_FILE).is_file():
        weight_map = read_json(index).get("weight_map")
        return weight_map.keys() if isinstance(weight_map, dict) else ()
    return _header(folder / WEIGHTS_FILE).keys()


def _stored_type(folder: Path) -> str | None:
    """Type of the embedding, in config.json's name; None where there is none, or of another type."""
    index = folder / INDEX_FILE
    listed = read_json(index).get("weight_map") if index.is_file() else None
    file_name = listed.get(EMBEDDING) if isinstance(listed, dict) else WEIGHTS_FILE
    described = _header(folder / str(file_name)).get(EMBEDDING) or {}
    return _STORED_TYPES.get(str(described.get("dtype")))


def _header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file; empty where it cannot be read, which is reported when its tensors are read."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if length <= path.stat().st_size else {}
    except (OSError, ValueError):
        return {}
    return header if isinstance(header, dict) else {}


def _holds_layer(names: Collection[str], layer: int) -> bool:
    return any(name.startswith(f"model.layers.{layer}.") for name in names)
