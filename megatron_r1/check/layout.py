"""Checks of the layout: ranks, degrees of parallelism, and what they divide."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from megatron_r1.check.finding import Check, Finding, Job, passed, refusals, refused, unknown, warning
from megatron_r1.config.cross_checks import check_batch, check_degrees, check_division, check_sequences
from megatron_r1.config.keys import reads
from megatron_r1.config.parallel import ParallelConfig


def _degrees(job: Job) -> Iterator[Finding]:
    found = list(refusals(check_degrees, job.config.parallel, job.ranks))
    yield from found or [passed(f"{job.ranks} ranks, {job.data_parallel} data-parallel")]
    per_node, nodes = job.config.check.gpus_per_node, job.config.check.nodes
    if job.on_gpus and 0 < nodes * per_node < job.ranks:
        text = f"check.ranks={job.ranks}: check.nodes={nodes} have {nodes * per_node} GPUs"
        yield refused(text, f"take check.nodes={-(-job.ranks // per_node)}")
    if job.on_gpus and job.ranks > per_node and job.ranks % per_node:
        text = f"check.ranks={job.ranks}: no multiple of check.gpus_per_node={per_node}"
        yield refused(text, f"take a multiple of {per_node}: SLURM gives whole nodes to a job of several")


def _stages(job: Job) -> Iterator[Finding]:
    alone = replace(job.config.parallel, tensor=1, expert=1, expert_tensor=1)
    yield from refusals(check_division, alone, job.config.model)


def _tensor(job: Job) -> Iterator[Finding]:
    degrees, per_node = job.config.parallel, job.config.check.gpus_per_node
    yield from refusals(check_division, ParallelConfig(tensor=degrees.tensor), job.config.model)
    if job.on_gpus and degrees.tensor > per_node:
        yield warning(
            f"parallel.tensor={degrees.tensor}: exchanges every layer's activations between nodes",
            f"take at most {per_node}, the GPUs of a node",
        )


def _experts(job: Job) -> Iterator[Finding]:
    degrees, moe, per_node = job.config.parallel, job.config.model.moe, job.config.check.gpus_per_node
    found = list(refusals(check_division, ParallelConfig(expert=degrees.expert), job.config.model))
    yield from found
    nodes = -(-degrees.expert * degrees.expert_tensor // per_node)
    if not found and job.on_gpus and nodes > 1 and moe.num_groups > 1 and moe.num_groups % nodes:
        yield warning(
            f"model.moe.num_groups={moe.num_groups} on {nodes} nodes: groups lie across nodes, so a token may visit "
            f"more of them than model.moe.group_top_k={moe.group_top_k}",
            "take parallel.expert so that its nodes divide the groups",
        )


def _expert_tensor(job: Job) -> Iterator[Finding]:
    yield from refusals(
        check_division, ParallelConfig(expert_tensor=job.config.parallel.expert_tensor), job.config.model
    )


def _sequences(job: Job) -> Iterator[Finding]:
    yield from refusals(check_sequences, job.config.parallel, job.config.train.sequence_length)


def _batch(job: Job) -> Iterator[Finding]:
    if any(refusals(check_degrees, job.config.parallel, job.ranks)):
        yield unknown("not checked: the ranks do not fit the degrees")
        return
    share = job.config.train.global_batch_size // job.data_parallel
    passes = -(-share // job.config.train.micro_batch_size)
    found = list(refusals(check_batch, job.config, job.ranks))
    yield from found or [passed(f"{share} sequences a rank in {passes} micro-batches")]


CHECKS = (
    Check(2, "ranks against degrees", _degrees, lambda job: job.trains),
    Check(3, "layers against pipeline stages", _stages, lambda job: job.trains),
    Check(4, "heads, widths, vocabulary against tensor", _tensor, lambda job: job.trains),
    Check(5, "experts against expert ranks, groups against nodes", _experts, lambda job: job.trains),
    Check(6, "expert width against expert_tensor", _expert_tensor, lambda job: job.trains),
    Check(
        7, "sequence length against context, tensor", _sequences, lambda job: reads(job.verb, "train.sequence_length")
    ),
    Check(8, "batch against data parallelism", _batch, lambda job: reads(job.verb, "train.global_batch_size")),
)
