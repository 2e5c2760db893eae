"""Memory of a GPU that trainer and engine share, in the phases of a step in which the engine has its own there.

The table of phases is that of rl/placement.py. An engine that has released its memory keeps its process.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_r1.config.run import RunConfig
from megatron_r1.memory.engine import cache_bytes_per_token, engine_weights
from megatron_r1.memory.parts import CUDA_CONTEXT, MIB, MemoryParts

ENGINE_PROCESS = "engine's process"


def is_colocated(config: RunConfig, verb: str) -> bool:
    """Whether servers share the trainer's GPUs."""
    return verb == "grpo" and config.rollout.placement == "colocated"


def engine_moments(config: RunConfig, weights: float, training: Sequence[MemoryParts]) -> list[MemoryParts]:
    """Adds the engine's process to the moments of training, and gives the others.

    Args:
        weights: bytes of the trainer's weights on this rank.
    """
    for moment in training:
        moment.add(ENGINE_PROCESS, CUDA_CONTEXT)
    return [receiving(config, weights), sampling(config)]


def receiving(config: RunConfig, weights: float) -> MemoryParts:
    """While the engine receives weights: those of both, and a bucket."""
    memory = MemoryParts()
    memory.add("weights", weights)
    memory.add("bucket of weights", config.rollout.weight_sync.bucket_mb * MIB)
    memory.add_process()
    memory.add("engine's weights", engine_weights(config.model, config.rollout))
    memory.add(ENGINE_PROCESS, CUDA_CONTEXT)
    return memory


def sampling(config: RunConfig) -> MemoryParts:
    """While the engine samples: its weights, and the cache of one sequence of full length at least."""
    memory, model = MemoryParts(), config.model
    memory.add("engine's weights", engine_weights(model, config.rollout))
    memory.add("engine's cache", cache_bytes_per_token(model, config.rollout) * model.max_sequence_length)
    memory.add("CUDA and NCCL", CUDA_CONTEXT)
    memory.add(ENGINE_PROCESS, CUDA_CONTEXT)
    return memory
