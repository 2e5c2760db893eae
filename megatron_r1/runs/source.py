"""What `init.from` names: a Hugging Face folder, a run or a checkpoint, and its model; read without torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megatron_r1.checkpoint.manifest import MANIFEST_NAME, Manifest, read_manifest
from megatron_r1.checkpoint.store import Ranks, newest_verified
from megatron_r1.config.model import ModelConfig
from megatron_r1.config.schema import convert
from megatron_r1.errors import ConfigError
from megatron_r1.hf.model_config import model_of_folder


def find_model(source: str) -> ModelConfig:
    """The model of the weights that `init.from` names, by their config.json or manifest alone.

    Raises:
        ConfigError: there is no model.
        CheckpointDamaged: there are checkpoints, but no manifest can be read.
        DataError: config.json describes no model of this project.
    """
    if folder := hf_folder(source):
        return model_of_folder(folder)
    return find_checkpoint(source, read_manifest)[1]


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


def find_checkpoint(
    source: str, verified: Callable[[Path], Manifest], key: str = "init.from", ranks: Ranks | None = None
) -> tuple[Path, ModelConfig]:
    """The checkpoint that a run directory or checkpoint directory names, and its model.

    Args:
        verified: verifies one checkpoint, as far as the caller reads it.
        key: configuration key to name in an error.
        ranks: that look together; `verified` is then collective.

    Raises:
        ConfigError: there is no checkpoint.
        CheckpointDamaged: there are checkpoints, but none of them verifies.
    """
    folder = Path(source)
    if (folder / MANIFEST_NAME).is_file():
        manifest = verified(folder)
    elif found := newest_verified(folder / "checkpoints", verified, ranks):
        folder, manifest = found
    else:
        raise ConfigError(key, source, "must be a run with a checkpoint, a checkpoint, or hf:FOLDER")
    return folder, convert(ModelConfig, manifest.metadata["config"]["model"])
