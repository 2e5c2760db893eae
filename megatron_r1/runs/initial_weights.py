"""Finds initial weights: of a run, one of its checkpoints, or a Hugging Face folder.

A checkpoint is read after it has been verified, and verified as far as it is read: nobody hashes the optimizer's state
to start from weights. Ranks that start together find the model first (`InitialModel`), each by the manifest and the
small files, and divide the hashing of its weights among them when they read it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import Tensor

from megatron_r1.checkpoint.manifest import needed_for, verify, without_tensors
from megatron_r1.checkpoint.sharded import WholeTensors
from megatron_r1.checkpoint.store import OneRank, Ranks, verify_together
from megatron_r1.checkpoint.tensors import has_tensors
from megatron_r1.config.initial_model import without_unused_layers
from megatron_r1.config.model import ModelConfig
from megatron_r1.config.run import RunConfig
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import ConfigError
from megatron_r1.hf.load import NativeTensors
from megatron_r1.hf.model_config import model_of_folder
from megatron_r1.model.names import in_multi_token_layer
from megatron_r1.runs.source import find_checkpoint, hf_folder

logger = logging.getLogger(__name__)


Tensors = Mapping[str, Tensor]
"""Whole tensors by megatron-core name."""


@dataclass(frozen=True)
class Weights:
    """Weights of a model, with its config and tokenizer."""

    model: ModelConfig
    tensors: Tensors
    tokenizer_folder: Path
    folder: Path
    """The checkpoint or Hugging Face folder that was read."""

    def tokenizer(self) -> Tokenizer:
        """The tokenizer beside the weights; raises as `Tokenizer.load` and `check_vocabulary`."""
        return tokenizer_of(self.model, self.tokenizer_folder)


@dataclass(frozen=True)
class InitialModel:
    """A model to start from, found but not read: its config and tokenizer, and how its weights are read."""

    model: ModelConfig
    tokenizer_folder: Path
    folder: Path
    """The checkpoint or Hugging Face folder."""
    read: Callable[[Ranks], Weights]
    """Collective: verifies and opens the weights."""

    def tokenizer(self) -> Tokenizer:
        """The tokenizer beside the weights; raises as `Tokenizer.load` and `check_vocabulary`."""
        return tokenizer_of(self.model, self.tokenizer_folder)

    def weights(self, ranks: Ranks) -> Weights:
        """Collective: the weights; each rank hashes its share of what is read, none hashes an optimizer's state.

        Raises:
            CheckpointDamaged: neither the checkpoint nor an older one of its run verifies.
        """
        return self.read(ranks)

    def with_tensors(self, change: Callable[[Tensors], Tensors]) -> InitialModel:
        """The same model with what `change` makes of its tensors."""

        def read(ranks: Ranks) -> Weights:
            weights = self.read(ranks)
            return replace(weights, tensors=change(weights.tensors))

        return replace(self, read=read)

    def serving(self, model: ModelConfig) -> InitialModel:
        """The same weights for a run of `model`: without multi-token layers where it has none."""
        if model.mtp.num_layers or not self.model.mtp.num_layers:
            return self
        logger.info("%s: its multi-token layers are left out, as model.mtp.num_layers=0 says", self.folder)
        return replace(self.with_tensors(_WithoutMtp), model=without_unused_layers(self.model, model))


class _WithoutMtp(Mapping[str, Tensor]):
    """Tensors by name, without those of multi-token layers; each is read on access."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self._tensors = tensors
        self._names = [name for name in tensors if not in_multi_token_layer(name)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]


def find_initial_model(source: str, key: str = "init.from", which: str = "model") -> InitialModel:
    """Find the model that `source` names; of a checkpoint the manifest and the small files are read.

    Args:
        source: run directory, checkpoint directory, or ``hf:FOLDER``.
        key: configuration key to name in an error.
        which: weights to read from a checkpoint: ``model``, or ``ema``, the moving average.

    Raises:
        ConfigError: there is no model, or no moving average.
        CheckpointDamaged: there are checkpoints, but none of them verifies so far.
        DataError: the weights of a Hugging Face folder do not fit its config.
    """
    if folder := hf_folder(source, key):
        if which != "model":
            raise ConfigError("init.weights", which, f"must be model: {source} holds nothing else")
        model = model_of_folder(folder)
        opened = Weights(model, NativeTensors(folder, model), folder, folder)
        return InitialModel(model, folder, folder, lambda _: opened)
    folder, model = find_checkpoint(source, partial(verify, needed=without_tensors), key)
    check_holds(folder, which)
    return InitialModel(model, folder / "tokenizer", folder, partial(_verified, source, key, which))


def _verified(source: str, key: str, which: str, ranks: Ranks) -> Weights:
    """Collective: the weights of the newest checkpoint that verifies as far as they are read."""
    verified = partial(verify_together, ranks=ranks, needed=needed_for(which))
    folder, model = find_checkpoint(source, verified, key, ranks)
    check_holds(folder, which)
    return Weights(model, WholeTensors(folder, which), folder / "tokenizer", folder)


def find_weights(source: str, key: str = "init.from", which: str = "model") -> Weights:
    """The weights that `source` names, for a process that reads alone; as `find_initial_model` and its `weights`."""
    return find_initial_model(source, key, which).weights(OneRank())


def check_holds(checkpoint: Path, which: str) -> None:
    """Raises ConfigError: the checkpoint has no weights of this kind, ``model`` or ``ema``."""
    if not has_tensors(checkpoint, which, 0):
        allowed = f"must be model: {checkpoint} holds no moving average (train.ema_decay)"
        raise ConfigError("init.weights", which, allowed)


def initial_model(config: RunConfig) -> tuple[InitialModel, Tokenizer]:
    """The model that `init.from` names, and its tokenizer; raises as `find_initial_model` and its `tokenizer`."""
    found = find_initial_model(config.init.from_, which=config.init.weights).serving(config.model)
    return found, found.tokenizer()


def tokenizer_of(model: ModelConfig, folder: Path) -> Tokenizer:
    """The tokenizer of a folder, which must fit the model; raises as `Tokenizer.load` and `check_vocabulary`."""
    tokenizer = Tokenizer.load(folder)
    check_vocabulary(model.vocab_size, tokenizer)
    return tokenizer


def check_vocabulary(rows: int, tokenizer: Tokenizer, key: str = "model.vocab_size") -> None:
    """Refuse a model whose embedding has no row for some of the tokenizer's ids.

    Args:
        rows: of the embedding.
        key: configuration key to name in an error.

    Raises:
        ConfigError: names the largest id.
    """
    if (largest := tokenizer.vocab_size - 1) >= rows:
        token = tokenizer.backend.id_to_token(largest)
        raise ConfigError(key, rows, f"must be above {largest}, the tokenizer's largest id, which is of {token!r}")
