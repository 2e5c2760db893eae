"""Memory of the trainer's ranks: weights, gradients, optimizer, activations, logits and what else a step needs."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_r1.config.run import RunConfig
from megatron_r1.memory.activations import FP32, ActivationSizes
from megatron_r1.memory.chunks import PipelineChunk, chunks_of_ranks, needs_embedding, passes_in_flight
from megatron_r1.memory.parameters import Parameters, embedding

MIB, GB = 2**20, 10**9
CHUNK_LOGITS = 2**24
"""Logits that a multi-token layer's loss, and reinforcement learning, compute at a time (model/lm_head.py)."""
CUDA_CONTEXT = 1.5e9
"""Bytes of CUDA's context, kernels, cuBLAS and NCCL on a GPU: unverified, of what peers report between 1 and 2 GB."""
FRAGMENTATION = 0.04
"""Share of the other bytes that the allocator cannot use: 3 to 7 % on B200 (tests/memory/test_published_peaks.py)."""


@dataclass(slots=True)
class MemoryParts:
    """Bytes of one rank at the moment of its largest need, by what they are for."""

    parts: dict[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    def add(self, name: str, amount: float) -> None:
        """Add bytes under a name; none leave no part."""
        if amount:
            self.parts[name] = self.parts.get(name, 0.0) + amount

    def text(self) -> str:
        """The parts in gigabytes, largest first."""
        ordered = sorted(self.parts.items(), key=lambda part: -part[1])
        return ", ".join(f"{name} {amount / GB:.3g}" for name, amount in ordered)


@dataclass(frozen=True, slots=True)
class Pass:
    """What goes through the model at once."""

    tokens: int
    """Tokens of a micro-batch on one rank, before tensor-parallel ranks share them."""
    micro_batches: int
    """Micro-batches of an optimizer step on one rank."""


def largest_pass(config: RunConfig, verb: str, data_parallel: int) -> Pass:
    """The largest forward pass of one rank, and how many an update has."""
    if verb == "grpo":
        samples = config.rl.prompts_per_rollout * config.rl.group_size // config.rl.updates_per_rollout
        tokens = config.rl.tokens_per_micro_batch
        passes = samples * config.model.max_sequence_length // (tokens * data_parallel)
        return Pass(tokens, max(1, passes))
    train = config.train
    share = max(1, train.global_batch_size // data_parallel)
    size = min(train.micro_batch_size, share) * (2 if verb in ("dpo", "reward_model") else 1)
    return Pass(size * train.sequence_length // config.parallel.context, -(-share // train.micro_batch_size))


@dataclass(frozen=True, slots=True)
class _Model:
    """What a model's chunks hold, counted once for all ranks."""

    sizes: ActivationSizes
    parameters: dict[PipelineChunk, Parameters]
    kept: dict[PipelineChunk, float]
    """Bytes per token that a pass keeps."""
    embedding: Parameters

    def held(self, chunks: list[PipelineChunk]) -> Parameters:
        """All parameters of a pipeline rank."""
        tied = self.sizes.config.model.tied_embeddings
        found = sum((self.parameters[chunk] for chunk in chunks), Parameters())
        return found + (self.embedding if needs_embedding(chunks, tied) else Parameters())


def trainer_memory(config: RunConfig, ranks: int, work: Pass, gpu: bool) -> list[MemoryParts]:
    """Memory of the largest rank of each pipeline stage, while it trains.

    Args:
        ranks: of the trainer.
        gpu: whether it runs on GPUs.

    Raises:
        ConfigError: the degrees do not divide the model.
    """
    sizes, chunks_of = ActivationSizes(config, gpu), chunks_of_ranks(config.model, config.parallel)
    different = {chunk for chunks in chunks_of for chunk in chunks}  # few: most stages hold the same
    model = _Model(
        sizes,
        {chunk: chunk.parameters(config.model) for chunk in different},
        {chunk: activations(sizes, chunk) for chunk in different},
        embedding(config.model),
    )
    return [_of_rank(model, ranks, work, rank, chunks) for rank, chunks in enumerate(chunks_of)]


def job_memory(config: RunConfig, verb: str, ranks: int, work: Pass, gpu: bool) -> list[MemoryParts]:
    """As `trainer_memory`, with a verb's further models: a critic trains too, a teacher and reward models only score.

    Each counts as a model of the policy's shape. The reference policy is in host memory.
    """
    stages = trainer_memory(config, ranks, work, gpu)
    for stage in stages:
        weights = stage.parts.get("weights", 0.0)
        if verb == "grpo":
            if config.rl.advantage_estimator == "critic":
                states = sum(stage.parts.get(name, 0) for name in ("weights", "gradients", "optimizer", "FP8 weights"))
                stage.add("critic", states)
            stage.add("reward models", weights * len(config.reward.models))
            stage.add("teacher", weights if config.rl.teacher.from_ else 0)
        stage.add("teacher", weights if verb == "sft" and config.sft.teacher.from_ else 0)
    return stages


def _of_rank(model: _Model, ranks: int, work: Pass, rank: int, chunks: list[PipelineChunk]) -> MemoryParts:
    memory, sizes, held = MemoryParts(), model.sizes, model.held(chunks)
    config = sizes.config
    add_states(memory, config, held, ranks, sizes)
    for number, chunk in enumerate(chunks):
        group = config.parallel.microbatch_group_size_per_vp_stage
        flying = passes_in_flight(rank, number, config.parallel, work.micro_batches, group)
        memory.add("activations", flying * work.tokens * model.kept[chunk])
        if not chunk.loss and config.parallel.pipeline > 1:
            sent = sizes.element * config.model.hidden_size / sizes.tensor
            memory.add("sent to the next stage", flying * work.tokens * sent)
    _add_loss(memory, sizes, work, chunks)
    _add_exchange(memory, config, held, ranks, sizes)
    if sizes.gpu:
        memory.add("CUDA and NCCL", CUDA_CONTEXT)
        memory.add("fragmentation", FRAGMENTATION * memory.total)
    return memory


def add_states(memory: MemoryParts, config: RunConfig, held: Parameters, ranks: int, sizes: ActivationSizes) -> None:
    """Weights, gradients and the optimizer's share of them."""
    parallel, half = config.parallel, sizes.element == 2
    dense, experts = held.dense_of_rank(parallel), held.experts_of_rank(parallel)
    memory.add("weights", sizes.element * (dense + experts))
    memory.add("gradients", FP32 * (dense + experts))
    moments = 4 if config.train.optimizer.moments_dtype == "bf16" else 8
    kept = (FP32 if half else 0) + (0 if config.train.optimizer.offload else moments)
    memory.add("optimizer", kept * (dense / dense_ranks(config, ranks) + experts / expert_ranks(config, ranks)))
    if config.fp8.enabled and sizes.gpu:
        memory.add("FP8 weights", 2 * (dense + experts))  # by rows and by columns, kept between micro-batches


def dense_ranks(config: RunConfig, ranks: int) -> int:
    """Ranks that share the optimizer state of what is not in routed experts."""
    return max(1, ranks // (config.parallel.tensor * config.parallel.pipeline))


def expert_ranks(config: RunConfig, ranks: int) -> int:
    """Ranks that share the optimizer state of a routed expert."""
    parallel = config.parallel
    return max(1, ranks // (parallel.expert * parallel.expert_tensor * parallel.pipeline))


def activations(sizes: ActivationSizes, chunk: PipelineChunk) -> float:
    """Bytes per token that one pass through a chunk keeps, without what goes into the head."""
    attention, sparse = sizes.attention(), sizes.sparse_feed_forward()
    kept = (chunk.dense + chunk.sparse + chunk.mtp) * attention
    kept += chunk.dense * sizes.dense_feed_forward() + (chunk.sparse + chunk.mtp) * sparse
    kept += chunk.mtp * (sizes.mtp_inputs() + sizes.mtp_head())
    return kept + (sizes.embedding() if chunk.embedding or chunk.mtp else 0)


def _add_loss(memory: MemoryParts, sizes: ActivationSizes, work: Pass, chunks: list[PipelineChunk]) -> None:
    """The last stage works on one micro-batch's loss at a time."""
    if any(chunk.loss for chunk in chunks):
        memory.add("logits", work.tokens * sizes.head())
    workspace = max(_loss_workspace(sizes, work, chunk) for chunk in chunks)
    memory.add("loss workspace", workspace)


def _add_exchange(memory: MemoryParts, config: RunConfig, held: Parameters, ranks: int, sizes: ActivationSizes) -> None:
    """On a CPU gloo copies a gradient buffer to sum it over ranks, when a step's activations are gone."""
    parallel = config.parallel
    copies = [
        FP32 * held.dense_of_rank(parallel) * (dense_ranks(config, ranks) > 1),
        FP32 * held.experts_of_rank(parallel) * (expert_ranks(config, ranks) > 1),
    ]
    gone = memory.total - sum(memory.parts.get(name, 0.0) for name in ("weights", "gradients", "optimizer"))
    memory.add("gradient exchange", 0.0 if sizes.gpu else max(0.0, max(copies) - gone))


def _loss_workspace(sizes: ActivationSizes, work: Pass, chunk: PipelineChunk) -> float:
    """What computing the loss takes besides what it keeps."""
    rows = sizes.config.model.vocab_size / sizes.tensor
    if chunk.mtp:
        logits = min(work.tokens * rows, max(CHUNK_LOGITS, rows))
        kept = FP32 * rows * work.tokens if chunk.loss else 0.0  # gone by the time that multi-token layers go back
        return max(0.0, logits * (14 if sizes.element == 2 else 10) - kept)
    return work.tokens * rows * sizes.element if chunk.loss else 0.0
