"""From the rollout section of a configuration to a running engine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from megatron_r1.config.model import ModelConfig
from megatron_r1.config.rollout import RolloutConfig
from megatron_r1.rollout.engine import Engine
from megatron_r1.rollout.sync import DiskSync, GroupSync, NamedTensors, Sync

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


class SyncedEngine:
    """An engine and the way that weights take to it; without one it samples from the trainer's own weights."""

    def __init__(self, engine: Engine, sync: Sync | None):
        self.engine, self._sync = engine, sync

    def update_weights(self, version: str) -> None:
        """Sample from now on with the weights as they stand."""
        if self._sync:
            self._sync.push(version)
        else:
            self.engine.update_weights(Path(), version)


@contextmanager
def sglang_engine(
    rollout: RolloutConfig, model: ModelConfig, tensors: NamedTensors, tokenizer_folder: Path, logs: Path, device: str
) -> Iterator[SyncedEngine]:
    """SGLang servers on the weights that `tensors` gives; stopped at the end.

    Args:
        rollout: sampling, servers, and how weights reach them.
        model: shape of the model.
        tensors: gives the weights as they stand.
        tokenizer_folder: names the special tokens.
        logs: the servers' output goes here.
        device: ``cpu`` or ``cuda``.
    """
    from megatron_r1.rollout.sglang.engine import SGLangEngine
    from megatron_r1.rollout.sglang.sender import Sender

    with ExitStack() as stack:
        disk = stack.enter_context(DiskSync(tensors, model, tokenizer_folder))
        engine = stack.enter_context(
            SGLangEngine(
                disk.write(),
                rollout.sglang,
                logs,
                device,
                DTYPES[model.precision],
                context_length=model.max_sequence_length,
            )
        )
        if rollout.sync == "disk":
            disk.engine = engine
            yield SyncedEngine(engine, disk)
            return
        disk.close()  # the servers have read what they start from
        sender = stack.enter_context(
            Sender(
                engine.endpoints,
                "trainer",
                engine.tensor_parallel,
                group_backend(device),
                timeout_s=rollout.sglang.request_timeout_s,
            )
        )
        yield SyncedEngine(engine, GroupSync(engine, sender, tensors, model, rollout.bucket_mb << 20))


def group_backend(device: str) -> str:
    """Backend of the group that weights travel over. NCCL wants every rank on a GPU of its own; gloo takes any."""
    return "nccl" if device == "cuda" and torch.cuda.device_count() > 1 else "gloo"
