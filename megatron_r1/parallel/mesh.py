"""Process groups by degrees of parallelism."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from megatron_r1.config.cross_checks import check_degrees
from megatron_r1.config.parallel import ParallelConfig
from megatron_r1.errors import PlatformError
from megatron_r1.parallel import flight_recorder
from megatron_r1.parallel.heartbeats import HEARTBEAT_S
from megatron_r1.parallel.waiting import waiting
from megatron_r1.platform import Platform
from megatron_r1.platform.launcher import local_world_size, rank, world_size

NETWORK = ("MASTER_ADDR", "MASTER_PORT", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
"""Environment variables by which ranks find each other."""


@contextmanager
def process_groups(
    platform: Platform,
    degrees: ParallelConfig,
    seed: int,
    threads: int,
    timeout_minutes: float = 10,
    heartbeat_s: float = HEARTBEAT_S,
) -> Iterator[None]:
    """Join the job: process groups, thread count and random state; the groups are destroyed at the end.

    Args:
        platform: where the ranks run.
        degrees: degrees of parallelism.
        seed: seed of this job; ranks that must differ derive theirs from it.
        threads: CPU threads per rank; 0 divides `usable_cores` among the ranks of this machine.
        timeout_minutes: a collective operation that some rank has not joined by then fails; and a rank that sends
            no heartbeat for so long is lost.
        heartbeat_s: seconds between two heartbeats.

    Raises:
        PlatformError: the ranks cannot join, as their network is.
    """
    ranks = world_size()
    flight_recorder.record()
    check_degrees(degrees, ranks)
    torch.set_num_threads(threads or max(1, usable_cores() // local_world_size()))
    timeout = datetime.timedelta(minutes=timeout_minutes)
    # With its device NCCL opens the job's communicator at once, and messages between two ranks use it too.
    device = torch.device(platform.device) if platform.name == "cuda" else None
    try:
        store = _store_of_the_job(timeout) if ranks > 1 else None
        if store and device:
            claim_device(store, rank(), str(torch.cuda.get_device_properties(device).uuid))
        dist.init_process_group(
            platform.backend,
            # A single process needs no network rendezvous, so that any number of them can run on one machine.
            store=dist.PrefixStore("default_pg", store) if store else dist.HashStore(),
            rank=rank(),
            world_size=ranks,
            timeout=timeout,
            device_id=device,
        )
    except RuntimeError as error:  # torch.distributed's own errors derive from it
        raise PlatformError(_why_not_joined(error)) from error
    try:
        with (
            model_parallel_groups(degrees, seed, timeout_minutes),
            waiting(store, rank(), ranks, timeout.total_seconds(), heartbeat_s),
        ):
            yield
    finally:
        dist.destroy_process_group()


@contextmanager
def model_parallel_groups(degrees: ParallelConfig, seed: int, timeout_minutes: float = 10) -> Iterator[None]:
    """megatron-core's groups of the ranks that `torch.distributed` has, and its random states; destroyed at the end."""
    from megatron.core import parallel_state, tensor_parallel

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=degrees.tensor,
        pipeline_model_parallel_size=degrees.pipeline,
        virtual_pipeline_model_parallel_size=degrees.virtual_pipeline if degrees.virtual_pipeline > 1 else None,
        context_parallel_size=degrees.context,
        expert_model_parallel_size=degrees.expert,
        expert_tensor_parallel_size=degrees.expert_tensor,
        # Those that hold the embedding, or the weights that are tied to it, for which there are no multi-token layers.
        get_embedding_ranks=lambda stages: sorted({stages[0], stages[degrees.mtp_rank]}),
        # megatron-core's own checkpoints need them; they would be as many connections again.
        create_gloo_process_groups=False,
        distributed_timeout_minutes=timeout_minutes,
    )
    try:
        tensor_parallel.model_parallel_cuda_manual_seed(seed + 1)
        yield
    finally:
        parallel_state.destroy_model_parallel()


def _store_of_the_job(timeout: datetime.timedelta) -> dist.Store:
    """Collective: the store at MASTER_ADDR and MASTER_PORT, or the launcher's."""
    store: dist.Store = next(rendezvous("env://", timeout=timeout))[0]
    store.set_timeout(timeout)
    return store


def claim_device(store: dist.Store, own_rank: int, device: str) -> None:
    """Record that a rank uses a device.

    Raises:
        PlatformError: another rank of the job has it.
    """
    if (holder := store.compare_set(f"device/{device}", "", str(own_rank)).decode()) != str(own_rank):
        raise PlatformError(
            f"ranks {holder} and {own_rank} are both on GPU {device}: each needs one of its own "
            "(CUDA_VISIBLE_DEVICES, or --gpus-per-task=1)"
        )


def usable_cores() -> int:
    """Cores that this process may use. Two threads of one core count as one: in matrix products they only share it."""
    allowed, threads = len(os.sched_getaffinity(0)), psutil.cpu_count() or 1
    return max(1, allowed * (psutil.cpu_count(logical=False) or threads) // threads)


def _why_not_joined(error: RuntimeError) -> str:
    reason = " ".join(str(error).split("\n")[0].split())
    if "EADDRINUSE" in reason:
        return f"MASTER_PORT={os.environ.get('MASTER_PORT')}: is in use on this machine; choose another"
    settings = ", ".join(f"{name}={os.environ[name]}" for name in NETWORK if name in os.environ)
    return f"the ranks cannot join ({settings or 'no variables of the network are set'}): {reason}"


def tensor_parallel_group() -> dist.ProcessGroup:
    """The ranks among which each layer's matrices are divided."""
    from megatron.core import parallel_state

    group: dist.ProcessGroup = parallel_state.get_tensor_model_parallel_group()
    return group


def data_parallel_group() -> dist.ProcessGroup:
    """The ranks with the same weights as this one and other data."""
    from megatron.core import parallel_state

    group: dist.ProcessGroup = parallel_state.get_data_parallel_group()
    return group


def same_data_groups() -> tuple[dist.ProcessGroup, dist.ProcessGroup, dist.ProcessGroup]:
    """Groups that together hold the ranks that work on the same data as this one: pipeline, context and tensor."""
    from megatron.core import parallel_state

    pipeline, context = parallel_state.get_pipeline_model_parallel_group(), parallel_state.get_context_parallel_group()
    return pipeline, context, tensor_parallel_group()


def pipeline_stage() -> int:
    """Index of this rank's pipeline stage."""
    from megatron.core import parallel_state

    return int(parallel_state.get_pipeline_model_parallel_rank())


def is_last_stage() -> bool:
    """Whether this rank has the last layers, and therefore the logits."""
    from megatron.core import parallel_state

    return bool(parallel_state.is_pipeline_last_stage())


def broadcast_from_last_stage[Value](value: Value) -> Value:
    """Collective over the pipeline stages that work on the same data: the last stage's value, on each of them."""
    from megatron.core import parallel_state

    group = parallel_state.get_pipeline_model_parallel_group()
    if group.size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=parallel_state.get_pipeline_model_parallel_last_rank(), group=group)
    return box[0]


def all_gather_data_parallel[Value](value: Value) -> list[Value]:
    """Collective over the data-parallel ranks: each one's value, in rank order, on each of them."""
    group = data_parallel_group()
    values: list[Any] = [value] * group.size()
    if group.size() > 1:
        dist.all_gather_object(values, value, group=group)
    return values


def is_metrics_rank() -> bool:
    """Whether this is the one rank, of those that work on the same data, whose loss and metrics are used."""
    return is_last_stage() and dist.get_rank(tensor_parallel_group()) == 0
