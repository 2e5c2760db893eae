"""What a run's platform cannot do is refused before its ranks meet."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_r1.config.parallel import ParallelConfig
from megatron_r1.config.performance import PerformanceConfig
from megatron_r1.config.run import RunConfig
from megatron_r1.errors import ConfigError
from megatron_r1.platform import Platform
from megatron_r1.runs.training_run import check_platform

DELAYED = PerformanceConfig(overlap_moe_expert_parallel_comm=True, delay_wgrad_compute=True)
WITH_TE, WITH_TORCH = (Platform("cpu", "gloo", transformer_engine=there) for there in (True, False))


def test_transformer_engine_divides_no_fp32_sequences():
    config = RunConfig(parallel=ParallelConfig(context=2))
    with pytest.raises(ConfigError, match="parallel.context=2: needs model.dtype=bf16"):
        check_platform(config, WITH_TE)
    check_platform(config, WITH_TORCH)
    check_platform(replace(config, model=replace(config.model, dtype="bf16")), WITH_TE)


def test_torch_parts_delay_no_weight_gradients():
    config = RunConfig(performance=DELAYED)
    with pytest.raises(ConfigError, match="performance.delay_wgrad_compute=True: must be false without Transformer"):
        check_platform(config, WITH_TORCH)
    check_platform(config, WITH_TE)
