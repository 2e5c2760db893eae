"""Builds the SGLang engine and the weight sync of a configuration."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch

from megatron_r1.config.model import DTYPE_NAMES, ModelConfig
from megatron_r1.config.nodes import first_gpu
from megatron_r1.config.rollout import RolloutConfig
from megatron_r1.config.serving import check_division, on_cuda
from megatron_r1.config.sglang import SGLangConfig, SlurmConfig
from megatron_r1.model.shards import stage_leaders, whole_tensors
from megatron_r1.parallel import comm
from megatron_r1.parallel.phases import phase
from megatron_r1.platform.api_keys import api_key
from megatron_r1.platform.launcher import is_rank_zero, local_world_size, rank
from megatron_r1.rollout.engine import WeightSync
from megatron_r1.rollout.sglang.client import Endpoint
from megatron_r1.rollout.sglang.engine import SGLangEngine
from megatron_r1.rollout.sglang.pause import PAUSES
from megatron_r1.rollout.sglang.servers.discovery import ADMIN_KEY, API_KEY
from megatron_r1.rollout.sglang.servers.process import Server
from megatron_r1.rollout.sglang.servers.startup import NO_WEIGHTS, ServerFactory, first_weights
from megatron_r1.rollout.sync.group_sender import GroupSender
from megatron_r1.rollout.sync.ipc_sender import IpcSender
from megatron_r1.rollout.sync.model_folder import write_shape
from megatron_r1.rollout.sync.payload import WeightPayload
from megatron_r1.rollout.sync.strategies import (
    DiskSync,
    GatherOnlySync,
    GroupSync,
    ReadWeights,
    StageSync,
    WeightSender,
)

logger = logging.getLogger(__name__)


@contextmanager
def sglang_engine(
    rollout: RolloutConfig, model: ModelConfig, weights: ReadWeights, tokenizer_folder: Path, logs: Path, device: str
) -> Iterator[tuple[SGLangEngine, WeightSync]]:
    """SGLang servers and the sync of weights that one process can read; they generate after its first push.

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
        own = _gpus_to_spare(rollout, device)
        with phase("server_start"):
            engine = stack.enter_context(_start_servers(rollout, model, payload, tokenizer_folder, logs, device, own))
        if rollout.weight_sync.method == "disk":
            disk = stack.enter_context(DiskSync(weights, model, tokenizer_folder, payload))
            disk.engine = engine
            yield engine, disk
            return
        sender = stack.enter_context(_sender(rollout, engine.endpoints, "trainer", engine.tensor_parallel, device, own))
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

    No rank gathers the model for the start: the servers start on arbitrary weights, and the first push sends theirs.

    Arguments as of `sglang_engine`, but

    Args:
        module: this rank's part of the model.
        placement: all ranks enter its `starting_servers`, and rank 0 attaches the engine inside.
    """
    with ExitStack() as stack:
        payload, flush = weight_payload(rollout, model), PAUSES[rollout.weight_sync.pause_mode].flush_cache
        engine, ranks = None, local_world_size()
        with phase("server_start"), placement.starting_servers():
            if is_rank_zero():
                engine = stack.enter_context(
                    _start_servers(rollout, model, payload, tokenizer_folder, logs, device, ranks)
                )
                placement.attach(engine)
        if rollout.weight_sync.method == "disk":
            if engine is None:
                yield None, GatherOnlySync(module)
                return
            disk = DiskSync(lambda: whole_tensors(module), model, tokenizer_folder, payload)
            disk.engine = engine
            yield engine, stack.enter_context(disk)
            return
        # The keys are broadcast in memory, to ranks of this job alone.
        endpoints, width = comm.broadcast((engine.endpoints, engine.tensor_parallel) if engine else None)
        sender = None
        if (own_rank := rank()) in stage_leaders():
            sender = stack.enter_context(_sender(rollout, endpoints, f"trainer-{own_rank}", width, device, ranks))
        yield engine, StageSync(engine, sender, module, payload, rollout.weight_sync.bucket_mb << 20, flush)


def _start_servers(
    rollout: RolloutConfig,
    model: ModelConfig,
    payload: WeightPayload,
    tokenizer_folder: Path,
    logs: Path,
    device: str,
    trainers: int,
) -> SGLangEngine:
    """Servers of the model's shape, without weights."""
    with tempfile.TemporaryDirectory(prefix="megatron_r1-shape-") as folder:
        return SGLangEngine(
            write_shape(Path(folder), payload, tokenizer_folder),
            _servable(rollout.sglang, model, device),
            logs,
            device,
            DTYPE_NAMES[model.dtype],
            context_length=model.max_sequence_length,
            pause=PAUSES[rollout.weight_sync.pause_mode],
            first_gpu=servers_first_gpu(rollout, device, trainers),
            delta=rollout.weight_sync.delta,
        )


def _servable(sglang: SGLangConfig, model: ModelConfig, device: str) -> SGLangConfig:
    """The servers of a model, where this run starts them.

    Raises:
        ConfigError: SGLang does not serve the model with these options on this device.
    """
    if sglang.started_elsewhere:
        return sglang
    check_division(sglang.server, model)
    return replace(sglang, server=on_cuda(sglang.server, model)) if device == "cuda" else sglang


@contextmanager
def servers_of_node(
    rollout: RolloutConfig, model: ModelConfig, tokenizer_folder: Path, logs: Path, device: str, node: str
) -> Iterator[list[Server]]:
    """The servers of one node for a trainer on another, at the ports that it expects; weights come from it.

    Arguments as of `sglang_engine`, but

    Args:
        node: name under which the trainer finds this node; the servers listen at its address.
    """
    sglang = replace(rollout.sglang, slurm=SlurmConfig())  # here they are started
    dtype, length, delta = DTYPE_NAMES[model.dtype], model.max_sequence_length, rollout.weight_sync.delta
    with tempfile.TemporaryDirectory(prefix="megatron_r1-shape-") as folder, ExitStack() as stack:
        shape = write_shape(Path(folder), weight_payload(rollout, model), tokenizer_folder)
        servable = _servable(sglang, model, device)
        factory = ServerFactory(shape, servable, logs, device, dtype, length, delta=delta, name=f"server-{node}")
        stack.callback(factory.close)
        servers = []
        for index, port in enumerate(rollout.sglang.slurm.ports):
            endpoint = Endpoint(f"http://{node}:{port}", api_key(API_KEY), api_key(ADMIN_KEY))
            servers.append(factory.launch(index, endpoint, first_weights(shape, NO_WEIGHTS)))
            stack.callback(servers[-1].close)
        yield servers


def servers_first_gpu(rollout: RolloutConfig, device: str, trainers: int) -> int:
    """The first GPU of the servers that this process starts; 0 where it starts none, and on a CPU.

    Args:
        trainers: GPUs of this machine, from the first, that servers leave to the ranks that send weights.
    """
    if device == "cpu" or rollout.sglang.started_elsewhere:
        return 0
    first = first_gpu(rollout, torch.cuda.device_count(), trainers)
    if rollout.placement == "separate" and rollout.sglang.first_gpu < 0 and first < trainers:
        logger.warning("the server shares the only GPU with the trainer (rollout.sglang.first_gpu=0 says so too)")
    return first


def _gpus_to_spare(rollout: RolloutConfig, device: str) -> int:
    """GPUs that servers leave to a process that trains nothing: one where there are enough."""
    needed = rollout.sglang.servers * rollout.sglang.server.tensor_parallel
    return int(device == "cuda" and needed < torch.cuda.device_count())


def weight_payload(rollout: RolloutConfig, model: ModelConfig) -> WeightPayload:
    """Which weights the servers get, and in which formats, at the start and with every sync."""
    return WeightPayload(
        model, include_mtp=rollout.weight_sync.include_mtp, fp8=rollout.sglang.server.quantization == "fp8"
    )


def _sender(
    rollout: RolloutConfig, endpoints: Sequence[Endpoint], name: str, tensor_parallel: int, device: str, trainers: int
) -> AbstractContextManager[WeightSender]:
    timeout_s = rollout.sglang.request_timeout_s
    if rollout.weight_sync.method == "ipc":
        return IpcSender(endpoints, name, tensor_parallel, device, timeout_s)
    backend, delta = group_backend(rollout, device, trainers), rollout.weight_sync.delta
    return GroupSender(endpoints, name, tensor_parallel, backend, timeout_s, delta=delta, packed=device != "cpu")


def group_backend(rollout: RolloutConfig, device: str, trainers: int) -> str:
    """Backend of the group that sends weights. NCCL needs every rank on a GPU of its own; gloo takes any."""
    if device == "cpu" or rollout.placement != "separate":
        return "gloo"
    if rollout.sglang.started_elsewhere:
        # SLURM may show each of several ranks its own GPU alone; a lone rank's server may be on the only one there is.
        return "nccl" if torch.cuda.device_count() > 1 or local_world_size() > 1 else "gloo"
    return "nccl" if servers_first_gpu(rollout, device, trainers) >= max(1, trainers) else "gloo"
