"""A second model in the process groups of a run: critic, teacher, reward model."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from megatron_r1.config.cross_checks import check_division
from megatron_r1.config.model import ModelConfig
from megatron_r1.config.parallel import ParallelConfig
from megatron_r1.config.performance import PerformanceConfig
from megatron_r1.config.fp8 import Fp8Config
from megatron_r1.errors import ConfigError
from megatron_r1.model.build import build_model
from megatron_r1.model.chunks import Model
from megatron_r1.model.reward_head import HEAD
from megatron_r1.model.shards import load_whole_tensors
from megatron_r1.parallel.comm import AllRanks
from megatron_r1.platform import Platform
from megatron_r1.runs.initial_weights import Weights, find_initial_model


def second_model(
    model: ModelConfig,
    parallel: ParallelConfig,
    platform: Platform,
    tensors: Mapping[str, Tensor] | None,
    prepare: Callable[[Model], None] = lambda _: None,
    performance: PerformanceConfig | None = None,
    precision: Fp8Config | None = None,
) -> Model:
    """Collective: build a model and load its weights; does not change the run's random state.

    Args:
        parallel: its degrees of parallelism.
        tensors: whole weights; None where the caller restores them from a checkpoint.
        prepare: adds modules that a language model does not have, before weights are loaded.
        performance, precision: as of `build_model`.
    """
    with torch.random.fork_rng():
        built = build_model(model, parallel, platform, 0, performance, precision)
    prepare(built)
    if tensors is not None:
        load_whole_tensors(built, tensors)
    return built


def find_reward_model(source: str, key: str) -> Weights:
    """Collective: the weights of a reward model with its head; raises as `find_initial_model` and its `weights`.

    Raises:
        ConfigError: `source` names another kind of model.
    """
    found = find_initial_model(source, key).weights(AllRanks())
    if f"{HEAD}.weight" not in found.tensors:
        raise ConfigError(key, source, "must be a run of the verb reward_model, or one of its checkpoints")
    return found


def check_shareable(parallel: ParallelConfig, model: ModelConfig, source: str, key: str) -> None:
    """Refuse a model that these degrees of parallelism do not divide.

    Args:
        source: where the model is from.
        key: configuration key to name in an error.

    Raises:
        ConfigError: names the degree that does not divide the model.
    """
    try:
        check_division(parallel, model)
    except ConfigError as error:
        raise ConfigError(key, source, f"must be a model that these degrees divide: {error}") from None
