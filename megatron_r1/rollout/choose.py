"""From the rollout section of a configuration to a running engine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_r1.config.model import ModelConfig
from megatron_r1.config.rollout import RolloutConfig
from megatron_r1.rollout.engine import Engine
from megatron_r1.rollout.sync import DiskSync, NamedTensors

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


class SyncedEngine:
    """An engine and the way that weights take to it."""

    def __init__(self, engine: Engine, sync: DiskSync | None):
        self.engine, self._sync = engine, sync

    def update_weights(self, version: str) -> None:
        """Sample from now on with the weights as they stand."""
        self.engine.update_weights(self._sync.write() if self._sync else Path(), version)


@contextmanager
def sglang_engine(
    rollout: RolloutConfig, model: ModelConfig, tensors: NamedTensors, tokenizer_folder: Path, logs: Path, device: str
) -> Iterator[SyncedEngine]:
    """SGLang servers on the weights that `tensors` gives; stopped at the end.

    Args:
        rollout: sampling and servers.
        model: shape of the model.
        tensors: gives the weights as they stand.
        tokenizer_folder: names the special tokens.
        logs: the servers' output goes here.
        device: ``cpu`` or ``cuda``.
    """
    from megatron_r1.rollout.sglang.engine import SGLangEngine

    with (
        DiskSync(tensors, model, tokenizer_folder) as sync,
        SGLangEngine(
            sync.write(),
            rollout.sglang,
            logs,
            device,
            DTYPES[model.precision],
            context_length=model.max_sequence_length,
        ) as engine,
    ):
        yield SyncedEngine(engine, sync)
