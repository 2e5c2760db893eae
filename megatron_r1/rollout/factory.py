"""Builds the SGLang engine and the weight sync of a configuration."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Protocol

import torch

from megatron_r1.config.model import DTYPE_NAMES, ModelConfig
from megatron_r1.config.rollout import RolloutConfig
from megatron_r1.model.shards import stage_leaders, whole_tensors
from megatron_r1.parallel import comm
from megatron_r1.parallel.launcher import is_rank_zero, local_world_size, rank
from megatron_r1.rollout.engine import WeightSync
from megatron_r1.rollout.sglang.client import Endpoint
from megatron_r1.rollout.sglang.engine import SGLangEngine
from megatron_r1.rollout.sglang.pause import PAUSES
from megatron_r1.rollout.sglang.servers.startup import first_gpu
from megatron_r1.rollout.sync.group_sender import GroupSender
from megatron_r1.rollout.sync.ipc_sender import IpcSender
from megatron_r1.rollout.sync.payload import WeightPayload
from megatron_r1.rollout.sync.strategies import (
    DiskSync,
    GatherOnlySync,
    GroupSync,
    ReadWeights,
    StageSync,
    WeightSender,
)


@contextmanager
def sglang_engine(
    rollout: RolloutConfig, model: ModelConfig, weights: ReadWeights, tokenizer_folder: Path, logs: Path, device: str
) -> Iterator[tuple[SGLangEngine, WeightSync]]:
    """SGLang servers on weights that one process can read, and their weight sync; stopped at the end.

    Args:
        rollout: sampling, servers, and how weights reach them.
        model: shape of the model.
        weights: reads the current weights.
        tokenizer_folder: names the special tokens.
        logs: folder of the servers' logs.
        device: ``cpu`` or ``cuda``.
    """
    with ExitStack() as stack:
        payload, flush = weight_payload(rollout, model), PAUSES[rollout.weight_sync.pause_mode].flush_cache
        disk = stack.enter_context(DiskSync(weights, model, tokenizer_folder, payload))
        engine = stack.enter_context(_start_servers(disk.write(), rollout, model, logs, device))
        if rollout.weight_sync.method == "disk":
            disk.engine = engine
            yield engine, disk
            return
        disk.close()  # the servers have read the weights that they start with
        sender = stack.enter_context(_sender(rollout, engine.endpoints, "trainer", engine.tensor_parallel, device))
        yield engine, GroupSync(engine, sender, weights, payload, rollout.weight_sync.bucket_mb << 20, flush)


class ServerPlacement(Protocol):
    """Decides who holds the devices' memory while servers start."""

    def starting_servers(self) -> AbstractContextManager[None]:
        """Around the start of servers."""
        ...

    def attach(self, engine: SGLangEngine) -> None:
        """The engine whose servers have started."""
        ...


@contextmanager
def training_sglang_engine(
    rollout: RolloutConfig,
    model: ModelConfig,
    module: torch.nn.Module,
    tokenizer_folder: Path,
    logs: Path,
    device: str,
    placement: ServerPlacement,
) -> Iterator[tuple[SGLangEngine | None, WeightSync]]:
    """Collective: SGLang servers of rank 0, None on other ranks, and the weight sync of a model that all ranks share.

    Arguments as of `sglang_engine`, but

    Args:
        module: this rank's part of the model.
        placement: all ranks enter its `starting_servers`, and rank 0 attaches the engine inside.
    """
    with ExitStack() as stack:
        payload, flush = weight_payload(rollout, model), PAUSES[rollout.weight_sync.pause_mode].flush_cache
        disk, others = DiskSync(lambda: whole_tensors(module), model, tokenizer_folder, payload), GatherOnlySync(module)
        stack.enter_context(disk)
        folder = engine = None
        if is_rank_zero():
            folder = disk.write()
        else:
            others.push("initial")
        with placement.starting_servers():
            if folder:
                engine = stack.enter_context(_start_servers(folder, rollout, model, logs, device))
                placement.attach(engine)
        if rollout.weight_sync.method == "disk":
            disk.engine = engine
            yield engine, disk if is_rank_zero() else others
            return
        disk.close()  # the servers have read the weights that they start with
        # The keys are broadcast in memory, to ranks of this job alone.
        endpoints, width = comm.broadcast((engine.endpoints, engine.tensor_parallel) if engine else None)
        sender = None
        if (own_rank := rank()) in stage_leaders():
            sender = stack.enter_context(_sender(rollout, endpoints, f"trainer-{own_rank}", width, device))
        yield engine, StageSync(engine, sender, module, payload, rollout.weight_sync.bucket_mb << 20, flush)


def _start_servers(folder: Path, rollout: RolloutConfig, model: ModelConfig, logs: Path, device: str) -> SGLangEngine:
    return SGLangEngine(
        folder,
        rollout.sglang,
        logs,
        device,
        DTYPE_NAMES[model.dtype],
        context_length=model.max_sequence_length,
        pause=PAUSES[rollout.weight_sync.pause_mode],
        first_gpu=servers_first_gpu(rollout, device),
        delta=rollout.weight_sync.delta,
    )


def servers_first_gpu(rollout: RolloutConfig, device: str) -> int:
    """The first GPU of the servers that this process starts; 0 where it starts none, and on a CPU."""
    if device == "cpu" or rollout.sglang.started_elsewhere:
        return 0
    return first_gpu(rollout, torch.cuda.device_count(), local_world_size())


def weight_payload(rollout: RolloutConfig, model: ModelConfig) -> WeightPayload:
    """Which weights the servers get, and in which formats, at the start and with every sync."""
    return WeightPayload(
        model, include_mtp=rollout.weight_sync.include_mtp, fp8=rollout.sglang.server.quantization == "fp8"
    )


def _sender(
    rollout: RolloutConfig, endpoints: Sequence[Endpoint], name: str, tensor_parallel: int, device: str
) -> AbstractContextManager[WeightSender]:
    timeout_s = rollout.sglang.request_timeout_s
    if rollout.weight_sync.method == "ipc":
        return IpcSender(endpoints, name, tensor_parallel, device, timeout_s)
    backend, delta = group_backend(rollout, device), rollout.weight_sync.delta
    return GroupSender(endpoints, name, tensor_parallel, backend, timeout_s, delta=delta, packed=device != "cpu")


def group_backend(rollout: RolloutConfig, device: str) -> str:
    """Backend of the group that sends weights. NCCL needs every rank on a GPU of its own; gloo takes any."""
    if device == "cpu" or rollout.placement != "separate":
        return "gloo"
    own_gpus = rollout.sglang.started_elsewhere or servers_first_gpu(rollout, device) >= local_world_size()
    return "nccl" if own_gpus and torch.cuda.device_count() > 1 else "gloo"
