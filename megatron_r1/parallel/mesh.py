"""Process groups by degrees of parallelism."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from megatron_r1.config.cross_checks import check_degrees
from megatron_r1.config.parallel import ParallelConfig
from megatron_r1.parallel.launcher import local_world_size, rank, world_size
from megatron_r1.platform import Platform


@contextmanager
def process_groups(
    platform: Platform, degrees: ParallelConfig, seed: int, threads: int, timeout_minutes: int = 10
) -> Iterator[None]:
    """Join the job: process groups, thread count and random state; the groups are destroyed at the end.

    Args:
        platform: where the ranks run.
        degrees: degrees of parallelism.
        seed: seed of this job; ranks that must differ derive theirs from it.
        threads: CPU threads per rank; 0 divides the cores among the ranks of this machine.
        timeout_minutes: a collective operation that some rank has not joined by then fails.
    """
    ranks = world_size()
    check_degrees(degrees, ranks)
    torch.set_num_threads(threads or max(1, (os.cpu_count() or 1) // local_world_size()))
    # A single process needs no network rendezvous, so that any number of them can run on one machine.
    store = dist.HashStore() if ranks == 1 else None
    timeout = datetime.timedelta(minutes=timeout_minutes)
    dist.init_process_group(platform.backend, store=store, rank=rank(), world_size=ranks, timeout=timeout)
    try:
        from megatron.core import parallel_state, tensor_parallel

        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=degrees.tensor,
            pipeline_model_parallel_size=degrees.pipeline,
            virtual_pipeline_model_parallel_size=degrees.virtual_pipeline if degrees.virtual_pipeline > 1 else None,
            context_parallel_size=degrees.context,
            expert_model_parallel_size=degrees.expert,
            expert_tensor_parallel_size=degrees.expert_tensor,
            distributed_timeout_minutes=timeout_minutes,
        )
        tensor_parallel.model_parallel_cuda_manual_seed(seed + 1)
        try:
            yield
        finally:
            parallel_state.destroy_model_parallel()
    finally:
        dist.destroy_process_group()


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
