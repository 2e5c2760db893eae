"""From the rollout section of a configuration to a running engine."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Protocol

import torch

from megatron_r1.config.model import DTYPE_NAMES, ModelConfig
from megatron_r1.config.rollout import RolloutConfig
from megatron_r1.hf.gather import stage_leaders, whole_tensors
from megatron_r1.parallel import comm
from megatron_r1.parallel.launcher import is_rank_zero, rank
from megatron_r1.rollout.sample import Outcome, Request, Sampling
from megatron_r1.rollout.sglang.client import Endpoint
from megatron_r1.rollout.sglang.engine import SGLangEngine
from megatron_r1.rollout.sglang.pause import PAUSES
from megatron_r1.rollout.sglang.servers.gpus import first_gpu
from megatron_r1.rollout.sync.group_sender import GroupSender
from megatron_r1.rollout.sync.ipc_sender import IpcSender
from megatron_r1.rollout.sync.payload import WeightPayload
from megatron_r1.rollout.sync.strategies import DiskSync, GroupSync, ReadWeights, StageSync, WeightSender, WeightSync


class SyncedEngine:
    """SGLang servers of rank 0, and the weight sync that every rank takes part in; see `RolloutEngine`.

    Attributes:
        sglang: None on the other ranks, which only give their part of the weights.
    """

    def __init__(self, sglang: SGLangEngine | None, sync: WeightSync):
        self.sglang, self._sync = sglang, sync

    def update_weights(self, version: str) -> None:
        self._sync.push(version)

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Outcome]:
        return self._on_rank_zero.generate(requests, sampling)

    @property
    def busy_seconds(self) -> float:
        return self._on_rank_zero.busy_seconds

    def abandon(self) -> None:
        self._on_rank_zero.abandon()

    def health(self) -> dict[str, int]:
        return self._on_rank_zero.health()

    @property
    def _on_rank_zero(self) -> SGLangEngine:
        assert self.sglang is not None, "only rank 0 generates"
        return self.sglang


@contextmanager
def sglang_engine(
    rollout: RolloutConfig, model: ModelConfig, tensors: ReadWeights, tokenizer_folder: Path, logs: Path, device: str
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
    with ExitStack() as stack:
        outgoing, flush = outgoing_weights(rollout, model), PAUSES[rollout.weight_sync.pause_mode].flush_cache
        disk = stack.enter_context(DiskSync(tensors, model, tokenizer_folder, outgoing))
        engine = stack.enter_context(_servers(disk.write(), rollout, model, logs, device))
        if rollout.weight_sync.method == "disk":
            disk.engine = engine
            yield SyncedEngine(engine, disk)
            return
        disk.close()  # the servers have read what they start from
        sender = stack.enter_context(_sender(rollout, engine.endpoints, "trainer", engine.tensor_parallel, device))
        yield SyncedEngine(
            engine, GroupSync(engine, sender, tensors, outgoing, rollout.weight_sync.bucket_mb << 20, flush)
        )


class ServerPlacement(Protocol):
    """Who holds the devices' memory while servers start."""

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
) -> Iterator[SyncedEngine]:
    """Collective: SGLang servers of rank 0 that get their weights from all ranks.

    Arguments as of `sglang_engine`, but

    Args:
        module: this rank's part of the model.
        placement: all ranks enter its `starting_servers`, and rank 0 attaches the engine inside.
    """
    is_leader = is_rank_zero()
    with ExitStack() as stack:
        outgoing, flush = outgoing_weights(rollout, model), PAUSES[rollout.weight_sync.pause_mode].flush_cache
        disk = stack.enter_context(DiskSync(lambda: whole_tensors(module), model, tokenizer_folder, outgoing))
        folder = disk.write() if is_leader else None
        if not is_leader:
            deque(whole_tensors(module), maxlen=0)
        engine = None
        with placement.starting_servers():
            if folder:
                engine = stack.enter_context(_servers(folder, rollout, model, logs, device))
            if engine and rollout.placement == "colocated":
                engine.release_memory()
        if rollout.weight_sync.method == "disk":
            disk.engine = engine
            yield SyncedEngine(engine, disk if is_leader else GatherOnlySync(module))
            return
        disk.close()  # the servers have read what they start from
        # The keys travel in memory, to ranks of this job alone.
        endpoints, width = comm.broadcast((engine.endpoints, engine.tensor_parallel) if engine else None)
        sender = None
        if (own_rank := rank()) in stage_leaders():
            sender = stack.enter_context(_sender(rollout, endpoints, f"trainer-{own_rank}", width, device))
        yield SyncedEngine(
            engine, StageSync(engine, sender, module, outgoing, rollout.weight_sync.bucket_mb << 20, flush)
        )


class GatherOnlySync:
    """The other ranks' side of a sync that rank 0 does alone: they give their part of the weights."""

    def __init__(self, module: torch.nn.Module):
        self._module = module

    def push(self, version: str) -> None:
        """Take part in gathering the weights."""
        deque(whole_tensors(self._module), maxlen=0)


def _servers(folder: Path, rollout: RolloutConfig, model: ModelConfig, logs: Path, device: str) -> SGLangEngine:
    length, dtype = model.max_sequence_length, DTYPE_NAMES[model.dtype]
    pause, first = PAUSES[rollout.weight_sync.pause_mode], servers_first_gpu(rollout, device)
    return SGLangEngine(
        folder, rollout.sglang, logs, device, dtype, context_length=length, pause=pause, first_gpu=first
    )


def servers_first_gpu(rollout: RolloutConfig, device: str) -> int:
    """The first GPU of the servers that this process starts; 0 where it starts none, and on a CPU."""
    if device == "cpu" or rollout.sglang.started_elsewhere:
        return 0
    return first_gpu(rollout, torch.cuda.device_count(), ranks_here())


def ranks_here() -> int:
    """Ranks of the trainer on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def outgoing_weights(rollout: RolloutConfig, model: ModelConfig) -> WeightPayload:
    """What of the model the servers are given, at the start and with every sync."""
    return WeightPayload(
        model, include_mtp=rollout.weight_sync.include_mtp, fp8=rollout.sglang.server.quantization == "fp8"
    )


def _sender(
    rollout: RolloutConfig, endpoints: Sequence[Endpoint], name: str, tensor_parallel: int, device: str
) -> AbstractContextManager[WeightSender]:
    timeout_s = rollout.sglang.request_timeout_s
    if rollout.weight_sync.method == "ipc":
        return IpcSender(endpoints, name, tensor_parallel, device, timeout_s)
    return GroupSender(endpoints, name, tensor_parallel, group_backend(rollout, device), timeout_s)


def group_backend(rollout: RolloutConfig, device: str) -> str:
    """Backend of the group that weights travel over. NCCL wants every rank on a GPU of its own; gloo takes any."""
    if device == "cpu" or rollout.placement != "separate":
        return "gloo"
    apart = rollout.sglang.started_elsewhere or servers_first_gpu(rollout, device) >= ranks_here()
    return "nccl" if apart and torch.cuda.device_count() > 1 else "gloo"
