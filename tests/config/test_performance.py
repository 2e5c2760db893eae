"""What memory and overlap switches need of one another, of the rest, and of the machine."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

from megatron_r1.config.cross_checks import check_sections
from megatron_r1.config.load import load
from megatron_r1.config.parallel import ParallelConfig
from megatron_r1.config.performance import (
    PerformanceConfig,
    recomputed_modules,
    refuse_on_cpu,
    refuse_without_transformer_engine,
)
from megatron_r1.config.run import RunConfig
from megatron_r1.errors import ConfigError

OVERLAP = {"overlap_moe_expert_parallel_comm": True}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"recompute_modules": ["attention"]}, "must be some of core_attn"),
        ({"moe_token_dispatcher_type": "flex"}, "must be one of allgather, alltoall"),
        ({"delay_wgrad_compute": True}, "needs overlap_moe_expert_parallel_comm=true"),
        (OVERLAP | {"moe_token_dispatcher_type": "allgather"}, "needs another dispatcher"),
        (OVERLAP | {"recompute_modules": ["moe"]}, "cannot be while overlap_moe_expert_parallel_comm=true"),
        (OVERLAP | {"moe_shared_expert_overlap": True}, "cannot be while overlap_moe_expert_parallel_comm=true"),
        ({"moe_shared_expert_overlap": True, "recompute_modules": ["shared_experts"]}, "cannot be while moe_shared"),
        ({"moe_shared_expert_overlap": True, "moe_token_dispatcher_type": "allgather"}, "needs another dispatcher"),
    ],
)
def test_switches_that_exclude_one_another_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        PerformanceConfig(**settings)


@pytest.mark.parametrize(
    ("parallel", "model", "message"),
    [
        ({}, {"dtype": "bf16"}, "needs parallel.expert above 1"),
        ({"expert": 2}, {"dtype": "fp32"}, "needs model.dtype=bf16"),
        ({"expert": 2, "pipeline": 2}, {"dtype": "bf16"}, "needs parallel.virtual_pipeline above 1"),
        ({"expert": 2}, {"dtype": "bf16", "mtp": 2}, "needs at most 1 multi-token layer"),
    ],
)
def test_overlap_of_experts_needs_what_megatron_core_needs(parallel, model, message):
    from megatron_r1.config.model import ModelConfig, MtpConfig

    shape = ModelConfig(dtype=model["dtype"], mtp=MtpConfig(num_layers=model.get("mtp", 1)))
    with pytest.raises(ConfigError, match=message):
        degrees, switches = ParallelConfig(**parallel), replace(PerformanceConfig(), **OVERLAP)
        check_sections(RunConfig(model=shape, parallel=degrees, performance=switches), "pretrain")


@pytest.mark.parametrize("verb", ["sft", "reward_model", "dpo", "grpo"])
def test_only_pretraining_overlaps_expert_communication(verb):
    with pytest.raises(ConfigError, match="overlap_moe_expert_parallel_comm=True: must be false: only pretrain"):
        check_sections(RunConfig(performance=PerformanceConfig(**OVERLAP)), verb)


def test_delayed_weight_gradients_need_transformer_engine():
    with pytest.raises(ConfigError, match="performance.delay_wgrad_compute=True: must be false without"):
        refuse_without_transformer_engine(PerformanceConfig(**OVERLAP, delay_wgrad_compute=True))
    refuse_without_transformer_engine(PerformanceConfig(**OVERLAP))


def test_context_parallel_ranks_on_gpus_need_bf16():
    config = RunConfig(platform="cuda", parallel=ParallelConfig(context=2))
    config.train.sequence_length = config.model.max_sequence_length = 64
    with pytest.raises(ConfigError, match="parallel.context=2: needs model.dtype=bf16 on GPUs"):
        check_sections(config, "pretrain")
    config.model.dtype = "bf16"
    check_sections(config, "pretrain")
    check_sections(replace(config, platform="cpu", model=replace(config.model, dtype="fp32")), "pretrain")


@pytest.mark.parametrize(
    ("verb", "command", "refused"),
    [
        ("pretrain", ["performance.apply_rope_fusion=true"], "apply_rope_fusion=True: must be false with latent"),
        ("pretrain", ["performance.apply_rope_fusion=true", "model.rope.factor=4"], ""),
        ("sft", ["performance.apply_rope_fusion=true", "model=tiny_dense", "init.from=hf:x"], ""),
        ("grpo", ["performance.moe_token_dispatcher_type=deepep", "init.from=x"], "needs parallel.expert x expert_"),
        ("pretrain", ["performance.moe_token_dispatcher_type=deepep", "parallel.tensor=2"], "needs parallel.expert x"),
        (
            "pretrain",
            ["performance.moe_token_dispatcher_type=deepep", "parallel.tensor=2", "parallel.expert_tensor=2"],
            "",
        ),
        ("pretrain", ["performance.moe_token_dispatcher_type=deepep", "parallel.expert=2"], ""),
    ],
)
def test_what_megatron_core_refuses_while_it_builds_is_refused_before(verb, command, refused):
    if not refused:
        load(verb, command)
        return
    with pytest.raises(ConfigError, match=rf"^performance\..*{refused}") as error:
        load(verb, command)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name",
    [item.name for item in fields(PerformanceConfig) if item.name.startswith(("apply", "gradient"))],
)
def test_what_only_a_gpu_can_do_is_refused_on_a_cpu(name):
    with pytest.raises(ConfigError, match=f"performance.{name}=True: needs .*: false on a CPU"):
        refuse_on_cpu(replace(PerformanceConfig(), **{name: True}))


@pytest.mark.parametrize("dispatcher", ["deepep", "hybridep"])
def test_gpu_dispatchers_are_refused_on_a_cpu(dispatcher):
    with pytest.raises(ConfigError, match="must be alltoall or allgather on a CPU"):
        refuse_on_cpu(PerformanceConfig(moe_token_dispatcher_type=dispatcher))


def test_what_a_cpu_can_do_is_not_refused():
    refuse_on_cpu(
        PerformanceConfig(
            recompute_modules=["layernorm"], moe_token_dispatcher_type="allgather", overlap_grad_reduce=True
        )
    )


@pytest.mark.parametrize(
    ("model", "recomputed"),
    [
        ("v3_671b", ["layernorm", "mla_up_proj", "mlp", "moe"]),
        ("qwen3_30b_a3b", ["layernorm", "mlp", "moe"]),
        ("qwen2_5_7b", ["layernorm", "mlp"]),
    ],
)
def test_modules_that_a_model_lacks_are_not_recomputed(model, recomputed):
    overrides = ["performance=long_sequences", "performance.moe_token_dispatcher_type=alltoall"]
    config = load("pretrain", [f"model={model}", *overrides, "train.sequence_length=128"])
    assert recomputed_modules(config.performance, config.model) == recomputed
