"""Seconds of an optimizer step: stages of the pipeline, their schedule, gradients, optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_r1.memory.chunks import PipelineChunk, chunks_of_ranks, parameters_of_rank
from megatron_r1.memory.parameters import Parameters
from megatron_r1.memory.trainer import dense_ranks, expert_ranks
from megatron_r1.plan import work
from megatron_r1.plan.constants import Constants
from megatron_r1.plan.exchange import exchange_seconds, traffic
from megatron_r1.plan.job import TrainingJob
from megatron_r1.plan.work import LayerWork, Sizes, Work

ADAM_BYTES = 4 + 2 * (4 + 8) + 2
"""Bytes that AdamW moves per parameter: gradient, master weight and moments in fp32, and the bf16 weight."""


@dataclass(frozen=True, slots=True)
class Seconds:
    """Of one pass of a micro-batch through one chunk of a pipeline rank."""

    compute: float = 0.0
    """Computation, tensor-parallel collectives, and the host's launches that they wait for."""
    exchange: float = 0.0
    """The experts' exchange, where nothing hides it."""
    arithmetic: float = 0.0
    """Of the computation, what the multiprocessors and not the memory limit."""

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(self.compute + other.compute, self.exchange + other.exchange, self.arithmetic + other.arithmetic)


@dataclass(frozen=True, slots=True)
class ChunkSeconds:
    """Forward pass, and the two parts of the backward pass."""

    forward: Seconds
    backward_input: Seconds
    backward_weight: Seconds


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of a step by what they are for; `total` is their sum."""

    compute: float
    """Of the slowest pipeline rank: computation of all micro-batches."""
    exchange: float
    """Exposed exchange of the experts."""
    bubble: float
    """Waiting in the pipeline."""
    gradients: float
    """Summing gradients and gathering weights, as far as the backward pass does not hide it."""
    optimizer: float

    @property
    def total(self) -> float:
        return self.compute + self.exchange + self.bubble + self.gradients + self.optimizer


def seconds(passed: Work, job: TrainingJob, constants: Constants) -> Seconds:
    """Seconds of a pass."""
    gpu, factor = job.gpu, constants.older if job.stack.older else 1.0
    bf16, fp8 = gpu.bf16 * gpu.sustained, gpu.fp8 * gpu.sustained
    arithmetic = passed.bf16 / bf16 / constants.matrix
    arithmetic += passed.fp8 / fp8 / (job.stack.fp8_share or constants.matrix)
    arithmetic += (passed.scores_bf16 / bf16 + passed.scores_fp8 / fp8) / constants.attention
    arithmetic *= factor
    compute = arithmetic + passed.memory / (constants.memory * gpu.memory_bandwidth) * factor
    compute += passed.tensor / (constants.link * gpu.nvlink)
    exchange = constants.exchange * exchange_seconds(passed.expert_network, passed.expert_nvlink, gpu)
    launch = constants.launch * (1 - job.stack.cuda_graphs)
    compute += passed.awaited * launch
    return Seconds(max(compute, passed.kernels * launch - exchange), exchange, arithmetic)


def chunk_work(chunk: PipelineChunk, kinds: dict[str, LayerWork]) -> LayerWork:
    """Work of one micro-batch in a chunk."""
    found = kinds["dense"] * chunk.dense
    if chunk.sparse:
        found += kinds["sparse"] * chunk.sparse
    if chunk.mtp:
        found += (kinds["mtp"] + kinds["head"]) * chunk.mtp
    return found + (kinds["head"] if chunk.loss else LayerWork())


@dataclass(frozen=True, slots=True)
class Counted:
    """A job with all that its ranks do, before constants make seconds of it."""

    job: TrainingJob
    chunks: tuple[LayerWork, ...]
    """Work of a micro-batch in each different chunk."""
    ranks: tuple[tuple[int, ...], ...]
    """Of each pipeline rank, the numbers of its chunks in `chunks`."""
    held: tuple[Parameters, ...]
    """Parameters of each pipeline rank."""


def count(job: TrainingJob) -> Counted:
    """Count what a job does.

    Raises:
        ConfigError: the degrees do not divide the model.
    """
    config = job.config
    sizes = Sizes(
        config, job.tokens, config.train.sequence_length * job.attended,
        traffic(config, job.gpu, job.stack.fp8_dispatch),
        job.imbalance, job.stack.fp8_attention and config.fp8.enabled, job.stack.gradient_bytes,
    )  # fmt: skip
    kinds = dict(work.parts(sizes))
    known: dict[PipelineChunk, int] = {}
    done: list[LayerWork] = []
    ranks: list[tuple[int, ...]] = []
    held: list[Parameters] = []
    for chunks in chunks_of_ranks(config.model, config.parallel):
        for chunk in chunks:
            if chunk not in known:
                known[chunk] = len(done)
                done.append(chunk_work(chunk, kinds))
        ranks.append(tuple(known[chunk] for chunk in chunks))
        if not held or ranks[-1] != ranks[-2]:
            held.append(parameters_of_rank(chunks, config.model))
        else:
            held.append(held[-1])
    return Counted(job, tuple(done), tuple(ranks), tuple(held))


def chunk_seconds(counted: Counted, constants: Constants) -> list[list[ChunkSeconds]]:
    """Seconds of each chunk of each pipeline rank."""
    found = [
        ChunkSeconds(
            seconds(work.forward, counted.job, constants),
            seconds(work.backward_input, counted.job, constants),
            seconds(work.backward_weight, counted.job, constants),
        )
        for work in counted.chunks
    ]  # fmt: skip
    return [[found[number] for number in rank] for rank in counted.ranks]


def overlaps(job: TrainingJob) -> bool:
    """Whether the experts' exchange of one micro-batch runs beside the computation of another."""
    return job.config.performance.overlap_moe_expert_parallel_comm or job.stack.schedule == "DualPipe"


def pair(forward: Seconds, backward: Seconds, job: TrainingJob) -> tuple[float, float]:
    """Computation and exposed exchange of a forward and a backward pass, one after the other or overlapped."""
    compute, exchange = forward.compute + backward.compute, forward.exchange + backward.exchange
    if not overlaps(job):
        return compute, exchange
    share = job.stack.dispatch_share
    slowed = compute + (forward.arithmetic + backward.arithmetic) * share / (1 - share)
    return slowed, max((1 - job.stack.overlapped_share) * exchange, exchange - slowed)


def step_time(counted: Counted, constants: Constants) -> StepTime:
    """Seconds of an optimizer step, with the closed formulas of the pipeline's bubble (DeepSeek-V3 report, table 2)."""
    job, ranks = counted.job, chunk_seconds(counted, constants)
    totals = []
    for chunks in ranks:
        pairs = [pair(one.forward, one.backward_input + one.backward_weight, job) for one in chunks]
        totals.append((sum(compute for compute, _ in pairs), sum(exchange for _, exchange in pairs)))
    compute, exchange = max(totals, key=sum)
    count = job.micro_batches
    return StepTime(
        compute * count, exchange * count, _bubble(job, compute + exchange, ranks), *_update(counted, constants, ranks)
    )


def _bubble(job: TrainingJob, largest: float, ranks: list[list[ChunkSeconds]]) -> float:
    """Of the rank that has most to do, whose pairs of passes take `largest` seconds a micro-batch."""
    degrees = job.config.parallel
    if degrees.pipeline == 1:
        return 0.0
    sent = 2 * job.tokens * job.config.model.hidden_size / degrees.tensor
    link = job.gpu.nvlink if degrees.tensor * degrees.pipeline * 2 <= job.gpu.nvlink_domain else job.gpu.network
    if job.stack.schedule == "DualPipe":
        stages = [one for rank in ranks for one in rank]
        inputs, weights = (
            sum(part.compute + part.exchange for part in parts) / len(stages)
            for parts in ([one.backward_input for one in stages], [one.backward_weight for one in stages])
        )
        return (degrees.pipeline / 2 - 1) * (largest + inputs - 2 * weights + 4 * sent / link)
    # A micro-batch passes through the other ranks' stages while the largest one waits.
    waits = (degrees.pipeline - 1) / degrees.virtual_pipeline
    return waits * (largest + 2 * sent / link)


def _update(counted: Counted, constants: Constants, ranks: list[list[ChunkSeconds]]) -> tuple[float, float]:
    """Seconds of exposed gradient sums, and of the optimizer."""
    job = counted.job
    config, gpu = job.config, job.gpu
    exposed = optimizer = 0.0
    for parameters, chunks in zip(counted.held, ranks, strict=True):
        exchange = _gradient_seconds(job, parameters, constants)
        if config.performance.overlap_grad_reduce:
            exchange = _after_backward(exchange, chunks, config.parallel.pipeline)
        exposed = max(exposed, exchange)
        dense = parameters.dense_of_rank(config.parallel) / dense_ranks(config, job.ranks)
        experts = parameters.experts_of_rank(config.parallel) / expert_ranks(config, job.ranks)
        optimizer = max(optimizer, ADAM_BYTES * (dense + experts) / (constants.memory * gpu.memory_bandwidth))
    return exposed, optimizer


def _after_backward(exchange: float, chunks: Sequence[ChunkSeconds], pipeline: int) -> float:
    """Seconds of a gradient sum of `exchange` seconds that are left when the last backward pass ends.

    The last micro-batch completes gradients. Where ranks have several chunks, the last `pipeline` micro-batches pass
    backwards through one chunk before the next, so that all but the first chunk's are complete long before.
    """
    backward = sum(one.backward_input.compute + one.backward_weight.compute for one in chunks)
    of_first = 1 / len(chunks)
    window = backward * (of_first + pipeline * (1 - of_first))
    return max(0.0, exchange - window, of_first * (exchange - backward))


def _gradient_seconds(job: TrainingJob, held: Parameters, constants: Constants) -> float:
    """Seconds in which a rank's gradients are summed and its new weights gathered.

    Weights are gathered in FP8 on Hopper alone: MXFP8 needs them by rows and by columns, and is gathered in bf16
    (megatron-core's reuse_grad_buf_for_mxfp8_param_ag).
    """
    config, gpu = job.config, job.gpu
    gathered = 1 if config.fp8.enabled and gpu.generation == "Hopper" else 2
    found = 0.0
    for amount, ranks, near in (
        (held.dense_of_rank(config.parallel), dense_ranks(config, job.ranks), config.parallel.tensor),
        (
            held.experts_of_rank(config.parallel),
            expert_ranks(config, job.ranks),
            config.parallel.expert * config.parallel.expert_tensor,
        ),
    ):
        # Ranks of one NVLink domain sum among themselves, and send the rest through all of their network adapters.
        together = max(1, gpu.nvlink_domain // near)
        bandwidth = gpu.nvlink if ranks <= together else min(gpu.nvlink, together * gpu.network)
        nbytes = (job.stack.gradient_bytes + gathered) * amount
        found += nbytes * (ranks - 1) / ranks / (constants.link * bandwidth)
    return found
