"""Bytes on disk and in host memory: checkpoints, journals, and what a rank keeps outside of its GPU."""

from __future__ import annotations

from megatron_r1.config.run import RunConfig
from megatron_r1.memory.activations import FP32
from megatron_r1.memory.chunks import chunks_of_ranks, parameters_of_rank
from megatron_r1.memory.colocated import is_colocated
from megatron_r1.memory.parameters import of_model
from megatron_r1.memory.parts import MemoryParts
from megatron_r1.memory.trainer import dense_ranks, expert_ranks, keeps_reference

TEXT_BYTES = 4
"""Bytes of text of a token, in the lines of a journal."""
TOKEN_BYTES = 8
"""Bytes of a token and of its log-probability."""


def checkpoint_bytes(config: RunConfig, verb: str) -> float:
    """Bytes of one checkpoint: weights, optimizer, and what the verb's run keeps besides."""
    parameters, half = of_model(config.model).total, config.model.dtype == "bf16"
    element = 2 if half else 4
    moments = 4 if config.train.optimizer.moments_dtype == "bf16" else 8
    each = element + moments + (FP32 if half else 0) + (FP32 if config.train.ema_decay else 0)
    return parameters * (each + element * keeps_reference(config, verb))


def journal_bytes_per_rollout(config: RunConfig) -> float:
    """Bytes of one rollout's file where every response is as long as it may be."""
    rl, moe = config.rl, config.model.moe
    tokens = rl.prompts_per_rollout * rl.group_size * config.model.max_sequence_length
    experts = (config.model.num_layers - moe.first_dense_layers) * moe.top_k * (2 if moe.num_experts > 256 else 1)
    return tokens * (TOKEN_BYTES + TEXT_BYTES + experts * rl.routing_replay)


def host_bytes_per_rank(config: RunConfig, ranks: int, verb: str) -> dict[str, float]:
    """Bytes of host memory that the rank with most weights keeps, by what they are for."""
    held = max((parameters_of_rank(chunks, config.model) for chunks in chunks_of_ranks(config.model, config.parallel)),
               key=lambda one: one.dense_of_rank(config.parallel) + one.experts_of_rank(config.parallel))  # fmt: skip
    dense, experts = held.dense_of_rank(config.parallel), held.experts_of_rank(config.parallel)
    weights, share = dense + experts, dense / dense_ranks(config, ranks) + experts / expert_ranks(config, ranks)
    element = 2 if config.model.dtype == "bf16" else 4
    moments = 4 if config.train.optimizer.moments_dtype == "bf16" else 8
    optimizer = moments + (FP32 if element == 2 else 0)
    found = {
        "reference policy": element * weights if keeps_reference(config, verb) else 0,
        "moving average": (FP32 + element) * share if config.train.ema_decay else 0,
        "checkpoint being written": (element + optimizer) * share if config.train.async_save else 0,
        "optimizer moments": moments * share if config.train.optimizer.offload else 0,
        "colocated trainer": element * weights + optimizer * share if is_colocated(config, verb) else 0,
        "sent weights": element * weights if verb == "grpo" and config.rollout.weight_sync.delta else 0,
        "process": PROCESS_BYTES,
    }
    return {name: amount for name, amount in found.items() if amount}


def host_memory_of_node(config: RunConfig, ranks: int, verb: str, ranks_per_node: int) -> MemoryParts:
    """Host memory of a node whose ranks keep as much as the one with most weights."""
    memory, here = MemoryParts(), min(ranks, ranks_per_node)
    for name, amount in host_bytes_per_rank(config, ranks, verb).items():
        memory.add(name, here * amount)
    return memory


PROCESS_BYTES = 3e9
"""Python, torch and the libraries of one rank: unverified on a GPU."""
