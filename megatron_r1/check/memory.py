"""Checks of memory: of the trainer's GPUs, of the engine's, of both where they share them, and of the hosts."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_r1.check.finding import Check, Finding, Job, finding_of, passed, refused, unknown, warning
from megatron_r1.config.keys import reads
from megatron_r1.config.nodes import nodes_of, servers_per_node, starts_servers
from megatron_r1.errors import ConfigError
from megatron_r1.memory.colocated import receiving
from megatron_r1.memory.engine import WEIGHT_AND_CACHE, cache_bytes_per_token, engine_weights
from megatron_r1.memory.parts import GB, MemoryParts
from megatron_r1.memory.storage import host_memory_of_node
from megatron_r1.memory.trainer import job_memory, largest_pass

SAVINGS = (
    "parallel.tensor, parallel.pipeline or parallel.expert larger, performance.recompute_modules, "
    "train.optimizer.moments_dtype=bf16 or train.optimizer.offload=true, or smaller micro-batches"
)


def stages_of(job: Job) -> list[MemoryParts]:
    """Memory of the trainer's largest rank of each pipeline stage.

    Raises:
        ConfigError: the layout does not fit the model.
    """
    work = largest_pass(job.config, job.verb, job.data_parallel)
    return job_memory(job.config, job.verb, job.ranks, work, job.on_gpus)


def _stages(job: Job) -> list[MemoryParts] | None:
    """As `stages_of`; None where the layout does not fit the model, which other checks say."""
    try:
        return stages_of(job)
    except (ConfigError, ZeroDivisionError):
        return None


def _trainer(job: Job) -> Iterator[Finding]:
    stages, memory = _stages(job), job.config.check.memory_gb
    if stages is None:
        yield unknown("not checked: the layout does not fit the model")
        return
    stage, worst = max(enumerate(stages), key=lambda one: one[1].total)
    text = f"{worst.total / GB:.1f} GB on pipeline stage {stage}: {worst.text()}"
    if len(stages) > 1:
        text += f"; stages {', '.join(f'{one.total / GB:.1f}' for one in stages)} GB"
    if not memory:
        yield unknown(text, "set check.gpu or check.gpu_memory_gb") if job.on_gpus else passed(text)
    elif worst.total > memory * GB:
        yield refused(f"{text}; the GPU has {memory:g} GB", f"take {SAVINGS}")
    elif worst.total > 0.93 * memory * GB:
        yield warning(f"{text}; the GPU has {memory:g} GB, little more", f"try a few steps first, or take {SAVINGS}")
    else:
        yield passed(text)


def _engine(job: Job) -> Iterator[Finding]:
    rollout, model, memory = job.config.rollout, job.config.model, job.config.check.memory_gb
    if rollout.engine != "sglang":
        return
    if not reads(job.verb, "model") and not job.model_known:
        yield unknown("the model is not known yet", "check again when init.from exists")
        return
    weights, each = engine_weights(model, rollout), cache_bytes_per_token(model, rollout)
    one = each * model.max_sequence_length
    text = f"{weights / GB:.1f} GB of weights on a rank, {one / GB:.3g} GB of cache for a sequence of full length"
    if not memory:
        yield unknown(text, "set check.gpu or check.gpu_memory_gb") if job.on_gpus else passed(text)
        return
    share = rollout.sglang.server.memory_fraction or WEIGHT_AND_CACHE
    left = share * memory * GB - weights
    sequences = int(max(0.0, left) // one)
    change = "take a larger rollout.sglang.server.tensor_parallel, quantization=fp8 or a shorter context"
    if sequences < 1:
        yield refused(f"{text}; {share:.0%} of {memory:g} GB has no room for one", change)
    elif rollout.sglang.max_total_tokens * each > left:
        text = f"rollout.sglang.max_total_tokens={rollout.sglang.max_total_tokens}: {text}"
        yield refused(f"{text}; {left / GB:.1f} GB are left", f"take at most {int(left // each)}, or 0")
    else:
        yield passed(f"{text}; room for {sequences} such sequences")


def _placement(job: Job) -> Iterator[Finding]:
    if not job.on_gpus or not starts_servers(job.config.rollout):
        return
    yield from _server_gpus(job)
    if job.config.rollout.placement == "colocated" and (stages := _stages(job)) is not None:
        yield from _colocated(job, stages)


def _server_gpus(job: Job) -> Iterator[Finding]:
    """Whether servers have GPUs: on nodes of their own, or on the first node beside the trainer's ranks."""
    rollout, machine, ranks = job.config.rollout, job.config.check, job.ranks if job.trains else 0
    per_node = machine.gpus_per_node
    try:
        needed = nodes_of(rollout, ranks, per_node, per_node)
    except ConfigError as error:
        yield finding_of(error)
        return
    servers, width = rollout.sglang.servers, rollout.sglang.server.tensor_parallel
    engine = max(0, machine.nodes - needed.trainer)
    if engine and rollout.placement == "separate":
        yield passed(f"{engine} nodes with {servers_per_node(rollout, per_node)} servers each")
    elif needed.engine and not job.trains:
        text = f"rollout.sglang.servers={servers}: they need {servers} x {width} GPUs, and the node has {per_node}"
        yield refused(text, f"take at most {per_node // width}")
    elif needed.engine:
        yield refused(
            f"rollout.placement=separate: servers need {servers} x {width} GPUs, and the trainer has "
            f"{min(ranks, per_node)} of the {per_node} of a node",
            f"add nodes for servers: check.nodes={needed.total}, with submit nodes={needed.total} "
            f"engine_nodes={needed.engine}; or take fewer ranks, or rollout.placement=colocated",
        )


def _colocated(job: Job, stages: list[MemoryParts]) -> Iterator[Finding]:
    rollout, memory = job.config.rollout, job.config.check.memory_gb
    trainer = max(one.total for one in stages)
    sending = receiving(job.config, max(one.of("weights") for one in stages))
    if not rollout.sglang.server.memory_saver:
        text = "rollout.sglang.server.memory_saver=false: the engine keeps its memory while the trainer trains"
        yield refused(text, "take true")
    text = f"{sending.total / GB:.1f} GB while weights are sent: {sending.text()}"
    if not memory:
        yield unknown(text, "set check.gpu or check.gpu_memory_gb")
    elif sending.total > memory * GB:
        yield refused(f"{text}, of {memory:g} GB", "take more ranks for either, or placement=separate")
    else:
        yield passed(f"{text}; {trainer / GB:.1f} GB while the trainer trains")


def _host(job: Job) -> Iterator[Finding]:
    try:
        node = host_memory_of_node(job.config, job.ranks, job.verb, job.config.check.gpus_per_node)
    except ConfigError:
        yield unknown("not checked: the layout does not fit the model")
        return
    text, memory = f"{node.total / GB:.0f} GB on a node: {node.text()}", job.config.check.host_memory_gb
    if not memory:
        yield unknown(text, "set check.host_memory_gb")
    elif node.total > memory * GB:
        change = "take fewer ranks a node, train.async_save=false, train.ema_decay=0 or train.optimizer.offload=false"
        yield refused(f"{text}; the node has {memory:g} GB", change)
    else:
        yield passed(text)


CHECKS = (
    Check(13, "trainer's memory", _trainer, lambda job: job.trains),
    Check(14, "engine's memory", _engine, lambda job: reads(job.verb, "rollout.engine")),
    Check(15, "GPUs and memory of servers", _placement, lambda job: reads(job.verb, "rollout.engine")),
    Check(16, "memory of a node", _host, lambda job: job.trains),
)
