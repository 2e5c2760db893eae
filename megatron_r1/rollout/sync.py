"""How new weights reach the engine: an export that the engine reads from disk, stamped with a version."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from torch import Tensor

from megatron_r1.config.model import ModelConfig
from megatron_r1.hf.config import serving_view
from megatron_r1.hf.export import export

_MEMORY = Path("/dev/shm")

NamedTensors = Callable[[], Iterable[tuple[str, Tensor]]]


class DiskSync:
    """Writes the weights as a folder that SGLang serves; two folders take turns, so that none is read half written.

    The folders live in memory where the system offers that, and are removed at `close`.
    """

    def __init__(self, tensors: NamedTensors, model: ModelConfig, tokenizer_folder: Path):
        """
        Args:
            tensors: gives the weights as they stand, whole, by megatron-core name.
            model: shape of the model.
            tokenizer_folder: names the special tokens.
        """
        self._tensors, self._model, self._tokenizer = tensors, model, tokenizer_folder
        place = _MEMORY if _MEMORY.is_dir() else None
        self._folder = Path(tempfile.mkdtemp(prefix="megatron_r1-weights-", dir=place))
        self._turn = 0

    def write(self) -> Path:
        """Export the weights as they stand; returns the folder to serve, without the multi-token layers."""
        self._turn = 1 - self._turn
        weights = self._folder / f"weights-{self._turn}"
        export(self._tensors(), self._model, weights, include_mtp=False, tokenizer_folder=self._tokenizer)
        return serving_view(weights, self._folder / f"view-{self._turn}")

    def close(self) -> None:
        """Remove the folders."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> DiskSync:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
