"""Memory of a GPU that trainer and engine share: the largest moment of a step, whoever needs it."""

from __future__ import annotations

import pytest

from megatron_r1.config.load import load
from megatron_r1.config.run import RunConfig
from megatron_r1.memory.engine import cache_bytes_per_token, engine_weights
from megatron_r1.memory.parts import CUDA_CONTEXT, MIB, MemoryParts
from megatron_r1.memory.storage import host_memory_of_node
from megatron_r1.memory.trainer import job_memory, largest_pass

SHARED = "rollout=sglang rollout.placement=colocated rollout.sglang.server.memory_saver=true"
V3 = "model=v3_671b parallel.tensor=8 parallel.pipeline=16 parallel.expert=16"
RANKS = 256


def config_of(*overrides: str) -> RunConfig:
    return load("grpo", " ".join([V3, *overrides]).split())


def fullest(config: RunConfig) -> MemoryParts:
    stages = job_memory(config, "grpo", RANKS, largest_pass(config, "grpo", 2), gpu=True)
    return max(stages, key=lambda stage: stage.total)


def test_an_engine_keeps_its_process_while_the_trainer_trains() -> None:
    small = "rollout.sglang.server.tensor_parallel=64"
    alone, shared = fullest(config_of("rollout=sglang", small)), fullest(config_of(SHARED, small))
    assert shared.total == pytest.approx(alone.total + CUDA_CONTEXT)


def test_weights_of_both_and_a_bucket_are_there_while_the_engine_receives_them() -> None:
    config = config_of(SHARED, "rollout.sglang.server.tensor_parallel=16")
    memory, work = fullest(config), largest_pass(config, "grpo", 2)
    weights = engine_weights(config.model, config.rollout)
    assert memory.of("engine's weights") == weights
    assert memory.of("bucket of weights") == config.rollout.weight_sync.bucket_mb * MIB
    stages = job_memory(config_of("rollout=sglang"), "grpo", RANKS, work, gpu=True)
    assert memory.of("weights") == max(stage.of("weights") for stage in stages)
    assert memory.total > weights + memory.of("weights") > max(stage.total for stage in stages)


def test_a_sequence_must_fit_into_the_cache_while_the_engine_samples() -> None:
    long = "model.max_sequence_length=2000000 rollout.sglang.server.tensor_parallel=32 rl.tokens_per_micro_batch=512"
    config = config_of(SHARED, long)
    cache = 2_000_000 * cache_bytes_per_token(config.model, config.rollout)
    assert fullest(config).of("engine's cache") == cache > 1e11


def test_host_memory_of_a_node_has_what_the_trainer_moves_away() -> None:
    shared, alone = (host_memory_of_node(config_of(one), RANKS, "grpo", 8) for one in (SHARED, "rollout=sglang"))
    states = 685e9 * (2 / 256 + 12 / 256) * 8  # weights and optimizer of a rank, as if all ranks held as much
    assert shared.of("colocated trainer") == pytest.approx(states, rel=0.35)
    assert shared.total == pytest.approx(alone.total + shared.of("colocated trainer"))
    assert shared.of("reference policy") == alone.of("reference policy") > 0
