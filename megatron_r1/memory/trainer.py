"""Memory of the trainer's ranks: weights, gradients, optimizer, activations, logits and what else a step needs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import chain
from operator import add, mul

from megatron_r1.config.run import RunConfig
from megatron_r1.memory.activations import FP32, ActivationSizes
from megatron_r1.memory.chunks import PipelineChunk, PipelineRanks
from megatron_r1.memory.colocated import engine_moments, is_colocated
from megatron_r1.memory.loss import LossMemory
from megatron_r1.memory.parameters import Parameters
from megatron_r1.memory.parts import MemoryParts
from megatron_r1.memory.passes import passes_at_peak

STATES = ("weights", "gradients", "optimizer", "FP8 weights")


@dataclass(frozen=True, slots=True)
class Pass:
    """What goes through the model at once."""

    tokens: int
    """Tokens of a micro-batch on one rank, before tensor-parallel ranks share them."""
    micro_batches: int
    """Micro-batches of an optimizer step on one rank."""
    imbalance: float = 1.0
    """Tokens of the busiest rank's experts over the mean."""


def largest_pass(config: RunConfig, verb: str, data_parallel: int, imbalance: float = 1.0) -> Pass:
    """The largest forward pass of one rank, and how many an update has."""
    if verb == "grpo":
        samples = config.rl.prompts_per_rollout * config.rl.group_size // config.rl.updates_per_rollout
        tokens = config.rl.tokens_per_micro_batch
        passes = samples * config.model.max_sequence_length // (tokens * data_parallel)
        return Pass(tokens, max(1, passes), imbalance)
    train = config.train
    share = max(1, train.global_batch_size // data_parallel)
    size = min(train.micro_batch_size, share) * (2 if verb in ("dpo", "reward_model") else 1)
    tokens = size * train.sequence_length // config.parallel.context
    return Pass(tokens, -(-share // train.micro_batch_size), imbalance)


def job_memory(config: RunConfig, verb: str, ranks: int, work: Pass, gpu: bool) -> list[MemoryParts]:
    """Memory of the largest rank of each pipeline stage, at the moment of a step when it is largest.

    A verb's further models count as ones of the policy's shape: a critic trains too, a teacher and reward models only
    score. The reference policy is in host memory.

    Args:
        ranks: of the trainer.
        gpu: whether it runs on GPUs.

    Raises:
        ConfigError: the degrees do not divide the model.
    """
    job = TrainerJob(config, verb, ranks, work, gpu, PipelineRanks(config, verb))
    return [max(job.moments(rank), key=_total) for rank in range(config.parallel.pipeline)]


def fullest_rank(config: RunConfig, verb: str, ranks: int, work: Pass, stages: PipelineRanks) -> MemoryParts:
    """As `job_memory`, of the stage that needs most, on GPUs.

    Args:
        stages: of the same verb and degrees.
    """
    job = TrainerJob(config, verb, ranks, work, True, stages)
    return max(chain(*map(job.moments, stages.first_of_each_kind())), key=_total)


def _total(memory: MemoryParts) -> float:
    return memory.total


class TrainerJob:
    """A trainer, and what its ranks need from moment to moment."""

    def __init__(self, config: RunConfig, verb: str, ranks: int, work: Pass, gpu: bool, stages: PipelineRanks):
        self._config, self._verb, self._ranks, self._work = config, verb, ranks, work
        self._sizes, self._stages = ActivationSizes(config, gpu, work.imbalance), stages
        self._loss = LossMemory(self._sizes, verb)
        self._kept = {chunk: self._activations(chunk) for chunk in {*chain(*stages.chunks)}}  # most hold the same

    def moments(self, rank: int) -> list[MemoryParts]:
        """Memory of a pipeline rank in an update, and where these are others: in scoring, beside an engine."""
        states = self._states(rank)
        found = [self._updating(rank, states)]
        if keeps_reference(self._config, self._verb):
            found.append(self._scoring(rank, states))
        if self._sizes.gpu:
            for moment in found:
                moment.add_process()
            if is_colocated(self._config, self._verb):
                found += engine_moments(self._config, states.of("weights"), found)
        return found

    def _states(self, rank: int) -> MemoryParts:
        """Weights, gradients and the optimizer's share of them, and further models."""
        memory, config, trained = MemoryParts(), self._config, self._stages.trained[rank]
        self._add_states(memory, self._stages.held[rank], trained)
        weights = memory.of("weights")
        if self._verb == "grpo":
            if config.rl.advantage_estimator == "critic":
                critic, head = MemoryParts(), any(chunk.loss for chunk in self._stages.chunks[rank])
                untrained = Parameters(config.model.vocab_size * config.model.hidden_size) * head
                self._add_states(critic, self._stages.held[rank], trained + untrained * -1)
                memory.add("critic", critic.total)
            memory.add("reward models", weights * len(config.reward.models))
            memory.add("teacher", weights if config.rl.teacher.from_ else 0)
        memory.add("teacher", weights if self._verb == "sft" and config.sft.teacher.from_ else 0)
        return memory

    def _add_states(self, memory: MemoryParts, held: Parameters, trained: Parameters) -> None:
        config, parallel, half = self._config, self._config.parallel, self._sizes.element == 2
        whole = held.dense_of_rank(parallel) + held.experts_of_rank(parallel)
        dense, experts = trained.dense_of_rank(parallel), trained.experts_of_rank(parallel)
        memory.add("weights", self._sizes.element * whole)
        memory.add("gradients", FP32 * (dense + experts))
        moments = 4 if config.train.optimizer.moments_dtype == "bf16" else 8
        kept = (FP32 if half else 0) + (0 if config.train.optimizer.offload else moments)
        shares = dense / dense_ranks(config, self._ranks) + experts / expert_ranks(config, self._ranks)
        memory.add("optimizer", kept * shares)
        if config.fp8.enabled and self._sizes.gpu:
            memory.add("FP8 weights", 2 * whole)  # by rows and by columns, kept between micro-batches

    def _updating(self, rank: int, states: MemoryParts) -> MemoryParts:
        memory, config, work, chunks = states.copy(), self._config, self._work, self._stages.chunks[rank]
        kept = [work.tokens * self._kept[chunk] for chunk in chunks]
        sends = config.parallel.pipeline > 1
        sent = [sends * (not chunk.loss) * work.tokens * self._sizes.hidden_states() for chunk in chunks]
        overlapped = config.performance.overlap_moe_expert_parallel_comm
        sizes = [*map(add, kept, sent)]
        passes = passes_at_peak(rank, config.parallel, work.micro_batches, sizes, overlapped)
        memory.add("activations", sum(map(mul, passes, kept)))
        memory.add("sent to the next stage", sum(map(mul, passes, sent)))
        if overlapped and not sends:  # a layer has gone forwards before another's backward pass is over
            memory.add("activations", kept[0] / chunks[0].layers)
        if any(chunk.loss for chunk in chunks):  # of one micro-batch at a time
            memory.add("logits", work.tokens * self._loss.kept())
        memory.add("loss workspace", max(self._loss.workspace(chunk, work.tokens) for chunk in chunks))
        memory.add("gradient exchange", 0.0 if self._sizes.gpu else self._exchange(rank, memory))
        return memory

    def _scoring(self, rank: int, states: MemoryParts) -> MemoryParts:
        """While the reference policy's weights are in the place of the policy's, which wait beside them."""
        memory, work = states.copy(), self._work
        memory.add("weights set aside", states.of("weights"))
        performance = replace(self._config.performance, recompute_modules=[])
        sizes = replace(self._sizes, config=replace(self._config, performance=performance))
        sparse = any(chunk.sparse for chunk in self._stages.chunks[rank])
        layer = sizes.attention() + (sizes.sparse_feed_forward() if sparse else sizes.dense_feed_forward())
        head = self._loss.scoring(work.tokens) if any(chunk.loss for chunk in self._stages.chunks[rank]) else 0.0
        memory.add("activations", max(work.tokens * layer, head))
        return memory

    def _activations(self, chunk: PipelineChunk) -> float:
        """Bytes per token that one pass through a chunk keeps, without what goes into the head."""
        sizes = self._sizes
        mtp = chunk.mtp if self._verb in ("pretrain", "sft") else 0  # others run the backbone alone
        layers, sparse = chunk.dense + chunk.sparse + mtp, chunk.sparse + mtp
        kept = layers * sizes.attention()
        kept += chunk.dense * sizes.dense_feed_forward() + sparse * sizes.sparse_feed_forward()
        kept += mtp * (sizes.mtp_inputs() + sizes.mtp_head())
        return kept + (sizes.embedding() if chunk.embedding or mtp else 0)

    def _exchange(self, rank: int, memory: MemoryParts) -> float:
        """On a CPU gloo copies a gradient buffer to sum it over ranks, when a step's activations are gone."""
        parallel, trained = self._config.parallel, self._stages.trained[rank]
        copies = [
            FP32 * trained.dense_of_rank(parallel) * (dense_ranks(self._config, self._ranks) > 1),
            FP32 * trained.experts_of_rank(parallel) * (expert_ranks(self._config, self._ranks) > 1),
        ]
        gone = memory.of("activations", "sent to the next stage", "logits", "loss workspace")
        return max(0.0, max(copies) - gone)


def dense_ranks(config: RunConfig, ranks: int) -> int:
    """Ranks that share the optimizer state of what is not in routed experts."""
    return max(1, ranks // (config.parallel.tensor * config.parallel.pipeline))


def expert_ranks(config: RunConfig, ranks: int) -> int:
    """Ranks that share the optimizer state of a routed expert."""
    parallel = config.parallel
    return max(1, ranks // (parallel.expert * parallel.expert_tensor * parallel.pipeline))


def keeps_reference(config: RunConfig, verb: str) -> bool:
    """Whether a reference policy takes the policy's place to score."""
    return verb == "dpo" or (verb == "grpo" and bool(config.rl.kl_coefficient) and not config.rl.teacher.from_)
