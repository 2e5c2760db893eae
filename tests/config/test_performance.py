"""What memory and overlap switches need of one another, of the rest, and of the machine."""

from __future__ import annotations

from dataclasses import fields

import pytest

from megatron_r1.config.performance import PerformanceConfig, refuse_on_cpu
from megatron_r1.config.run import RunConfig
from megatron_r1.errors import ConfigError

OVERLAP = {"overlap_expert_communication": True}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"recompute": ["attention"]}, "must be some of core_attn"),
        ({"dispatcher": "flex"}, "must be one of allgather, alltoall"),
        ({"delay_weight_gradients": True}, "needs overlap_expert_communication=true"),
        (OVERLAP | {"dispatcher": "allgather"}, "needs another dispatcher"),
        (OVERLAP | {"recompute": ["moe"]}, "cannot be while overlap_expert_communication=true"),
        (OVERLAP | {"overlap_shared_experts": True}, "cannot be while overlap_expert_communication=true"),
        ({"overlap_shared_experts": True, "recompute": ["shared_experts"]}, "cannot be while overlap_shared"),
        ({"overlap_shared_experts": True, "dispatcher": "allgather"}, "needs another dispatcher"),
    ],
)
def test_switches_that_exclude_one_another_are_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        PerformanceConfig(**settings)


@pytest.mark.parametrize(
    ("parallel", "model", "said"),
    [
        ({}, {"precision": "bf16"}, "needs parallel.expert above 1"),
        ({"expert": 2}, {"precision": "fp32"}, "needs model.precision=bf16"),
        ({"expert": 2, "pipeline": 2}, {"precision": "bf16"}, "needs parallel.virtual_pipeline above 1"),
        ({"expert": 2}, {"precision": "bf16", "mtp": 2}, "needs at most 1 multi-token layer"),
    ],
)
def test_overlap_of_experts_needs_what_megatron_core_needs(parallel, model, said):
    from megatron_r1.config.model import ModelConfig, MultiTokenConfig
    from megatron_r1.config.parallel import ParallelConfig

    shape = ModelConfig(precision=model["precision"], mtp=MultiTokenConfig(num_layers=model.get("mtp", 1)))
    with pytest.raises(ConfigError, match=said):
        RunConfig(model=shape, parallel=ParallelConfig(**parallel), performance=PerformanceConfig(**OVERLAP))


@pytest.mark.parametrize(
    "name", [item.name for item in fields(PerformanceConfig) if item.name.startswith(("fuse", "overlap_shared"))]
)
def test_what_only_a_gpu_can_do_is_refused_on_a_cpu(name):
    with pytest.raises(ConfigError, match=f"performance.{name}=True: needs .*: false on a CPU"):
        refuse_on_cpu(PerformanceConfig(**{name: True}))


@pytest.mark.parametrize("dispatcher", ["deepep", "hybridep"])
def test_gpu_dispatchers_are_refused_on_a_cpu(dispatcher):
    with pytest.raises(ConfigError, match="must be alltoall or allgather on a CPU"):
        refuse_on_cpu(PerformanceConfig(dispatcher=dispatcher))


def test_what_a_cpu_can_do_is_not_refused():
    refuse_on_cpu(PerformanceConfig(recompute=["layernorm"], dispatcher="allgather", overlap_gradient_reduction=True))
