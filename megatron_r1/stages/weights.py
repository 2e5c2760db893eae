"""Where weights come from: a run, one of its checkpoints, or a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from megatron_r1.checkpoint.manifest import verify
from megatron_r1.checkpoint.sharded import WholeTensors
from megatron_r1.checkpoint.store import newest_verified
from megatron_r1.checkpoint.tensors import has_tensors
from megatron_r1.config.convert import convert
from megatron_r1.config.model import ModelConfig
from megatron_r1.errors import ConfigError
from megatron_r1.hf.load import load_tensors, model_config_from_hf

_SHAPELESS = ("init_std", "mtp.loss_coefficient", "moe.bias_update_rate", "moe.sequence_loss_coefficient")
"""Fields that say how a model is trained, not what it computes."""


@dataclass(frozen=True)
class Weights:
    """A model that was found."""

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
        which: of a checkpoint's weights: ``model``, or ``ema``, their moving average.

    Raises:
        ConfigError: nothing there, or no moving average.
        CheckpointDamaged: a checkpoint is there, but neither it nor an older one verifies.
        DataError: a Hugging Face folder is not what its config says.
    """
    if source.startswith("hf:"):
        folder = Path(source.removeprefix("hf:"))
        if not (folder / "config.json").is_file():
            raise ConfigError(key, source, "must be a folder with a config.json")
        if which != "model":
            raise ConfigError("init.weights", which, f"must be model: {source} holds nothing else")
        model = model_config_from_hf(folder / "config.json")
        return Weights(model, dict(load_tensors(folder, model)), folder, folder)
    folder = Path(source)
    if (folder / "manifest.json").is_file():
        manifest = verify(folder)
    elif found := newest_verified(folder / "checkpoints"):
        folder, manifest = found
    else:
        raise ConfigError(key, source, "must be a run with a checkpoint, a checkpoint, or hf:FOLDER")
    if not has_tensors(folder, which, 0):
        raise ConfigError("init.weights", which, f"must be model: {folder} holds no moving average (train.ema_decay)")
    model = convert(ModelConfig, manifest.metadata["config"]["model"])
    return Weights(model, WholeTensors(folder, which), folder / "tokenizer", folder)


def check_same_model(wanted: ModelConfig, found: ModelConfig, source: str) -> None:
    """Refuse weights of another shape, naming the first field that differs.

    Raises:
        ConfigError: a shape differs.
    """
    for name, (mine, theirs) in _fields(wanted, found):
        if mine != theirs and name not in _SHAPELESS:
            raise ConfigError(f"model.{name}", mine, f"must be {theirs}, as in {source}")


def _fields(wanted: object, found: object, prefix: str = ""):
    for field in type(wanted).__dataclass_fields__:  # type: ignore[attr-defined]
        mine, theirs = getattr(wanted, field), getattr(found, field)
        if hasattr(mine, "__dataclass_fields__"):
            yield from _fields(mine, theirs, f"{prefix}{field}.")
        else:
            yield f"{prefix}{field}", (mine, theirs)
