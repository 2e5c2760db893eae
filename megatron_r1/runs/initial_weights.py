"""Finds initial weights: of a run, one of its checkpoints, or a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_r1.checkpoint.manifest import Manifest, read_manifest, verify
from megatron_r1.checkpoint.sharded import WholeTensors
from megatron_r1.checkpoint.store import newest_verified, step_folders
from megatron_r1.checkpoint.tensors import has_tensors
from megatron_r1.config.schema import convert
from megatron_r1.config.model import ModelConfig
from megatron_r1.config.run import RunConfig
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import ConfigError
from megatron_r1.hf.load import NativeTensors, model_config_from_hf

_SHAPELESS = ("init_std", "mtp.loss_coefficient", "moe.bias_update_rate", "moe.sequence_loss_coefficient")
"""Fields that affect how a model is trained, not what it computes."""


@dataclass(frozen=True)
class Weights:
    """Weights of a model, with its config and tokenizer."""

    model: ModelConfig
    tensors: Mapping[str, Tensor]
    """Whole tensors by megatron-core name."""
    tokenizer_folder: Path
    folder: Path
    """The checkpoint or Hugging Face folder that was read."""


def find_weights(source: str, key: str = "init.from", which: str = "model") -> Weights:
    """Read the model that `source` names.

    Args:
        source: run directory, checkpoint directory, or ``hf:FOLDER``.
        key: configuration key to name in an error.
        which: weights to read from a checkpoint: ``model``, or ``ema``, the moving average.

    Raises:
        ConfigError: there is no model, or no moving average.
        CheckpointDamaged: there are checkpoints, but none of them verifies.
        DataError: the weights of a Hugging Face folder do not fit its config.
    """
    if folder := hf_folder(source, key):
        if which != "model":
            raise ConfigError("init.weights", which, f"must be model: {source} holds nothing else")
        model = model_config_from_hf(folder / "config.json")
        return Weights(model, NativeTensors(folder, model), folder, folder)
    folder, model = find_checkpoint(source, key, which)
    return Weights(model, WholeTensors(folder, which), folder / "tokenizer", folder)


def initial_model(config: RunConfig) -> tuple[Weights, Tokenizer]:
    """The weights that `init.from` names, and their tokenizer; raises as `find_weights`.

    Raises:
        ConfigError: the tokenizer has more tokens than the run's model has embeddings.
    """
    found = find_weights(config.init.from_, which=config.init.weights)
    tokenizer = Tokenizer.load(found.tokenizer_folder)
    check_vocabulary(config.model, tokenizer)
    return found, tokenizer


def check_vocabulary(model: ModelConfig, tokenizer: Tokenizer) -> None:
    """Raises ConfigError: the tokenizer has more tokens than the model has embeddings."""
    if tokenizer.vocab_size > model.vocab_size:
        allowed = f"must be at least {tokenizer.vocab_size}, the size of the tokenizer's vocabulary"
        raise ConfigError("model.vocab_size", model.vocab_size, allowed)


def hf_folder(source: str, key: str = "init.from") -> Path | None:
    """The folder that ``hf:FOLDER`` names; None where `source` names something else.

    Raises:
        ConfigError: the folder has no config.json.
    """
    if not source.startswith("hf:"):
        return None
    folder = Path(source.removeprefix("hf:"))
    if not (folder / "config.json").is_file():
        raise ConfigError(key, source, "must be a folder with a config.json")
    return folder


def find_checkpoint(source: str, key: str, which: str, verified: bool = True) -> tuple[Path, ModelConfig]:
    """The checkpoint that a run directory or checkpoint directory names, and its model; raises as `find_weights`.

    Args:
        verified: verify the checkpoint by its manifest and fall back to an older one; without, only the manifest of the
            newest one is read.
    """
    folder = Path(source)
    if (folder / "manifest.json").is_file():
        manifest = verify(folder) if verified else read_manifest(folder)
    elif found := newest_verified(folder / "checkpoints") if verified else _newest(folder / "checkpoints"):
        folder, manifest = found
    else:
        raise ConfigError(key, source, "must be a run with a checkpoint, a checkpoint, or hf:FOLDER")
    if not has_tensors(folder, which, 0):
        raise ConfigError("init.weights", which, f"must be model: {folder} holds no moving average (train.ema_decay)")
    return folder, convert(ModelConfig, manifest.metadata["config"]["model"])


def _newest(folder: Path) -> tuple[Path, Manifest] | None:
    return next(((path, read_manifest(path)) for _, path in step_folders(folder)), None)


def check_same_model(wanted: ModelConfig, found: ModelConfig, source: str) -> None:
    """Refuse weights of another shape, naming the first field that differs.

    Positions have no weights: a run may have a shorter context than the model it starts from, or extend its rotary
    positions.

    Raises:
        ConfigError: a shape differs, or rotary positions are extended in another way than in the weights' training.
    """
    dense = not (wanted.moe.num_experts or found.moe.num_experts)
    for name, (mine, theirs) in _fields(wanted, found):
        if dense and name.startswith("moe."):
            continue  # has no effect without experts, and the config.json of a dense model does not have it
        positions = name == "max_sequence_length" or name.startswith("rope.")
        if mine != theirs and name not in _SHAPELESS and not positions:
            raise ConfigError(f"model.{name}", mine, f"must be {theirs}, as in {source}")
    _check_positions(wanted, found, source)


def _check_positions(wanted: ModelConfig, found: ModelConfig, source: str) -> None:
    """Refuse rotary positions that neither are those of the weights nor extend them."""
    rope, before = wanted.rope, found.rope
    if rope.factor < before.factor:
        raise ConfigError("model.rope.factor", rope.factor, f"must be at least {before.factor}, as in {source}")
    # Without an extension only the base has an effect; with one, all other settings but the factor are fixed.
    names = ["base"] if before.factor == 1 else [field.name for field in fields(before) if field.name != "factor"]
    for name in names:
        mine, theirs = getattr(rope, name), getattr(before, name)
        if mine != theirs:
            raise ConfigError(f"model.rope.{name}", mine, f"must be {theirs}, as in {source}")
    reach = max(found.max_sequence_length, int(rope.original_max_position * rope.factor))
    if wanted.max_sequence_length > reach:
        allowed = f"must be at most {reach}: model.rope.factor extends {source} no further"
        raise ConfigError("model.max_sequence_length", wanted.max_sequence_length, allowed)


def _fields(wanted: Any, found: Any, prefix: str = "") -> Iterator[tuple[str, tuple[Any, Any]]]:
    if type(wanted) is not type(found):
        yield f"{prefix}kind", (wanted.kind, found.kind)
        return
    for field in fields(wanted):
        mine, theirs = getattr(wanted, field.name), getattr(found, field.name)
        if is_dataclass(mine):
            yield from _fields(mine, theirs, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", (mine, theirs)
