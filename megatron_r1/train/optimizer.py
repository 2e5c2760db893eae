"""The optimizer: megatron-core's distributed one, over its gradient buffers.

Data-parallel ranks share its state out (ZeRO stage 1): each sums up, steps and keeps one part of every buffer, and
the new weights are gathered again. State is named after the parameter that it belongs to, so that a checkpoint can be
read by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from megatron_r1.config.performance import PerformanceConfig
from megatron_r1.config.train import TrainConfig
from megatron_r1.model.chunks import Model, chunks
from megatron_r1.model.spec import DTYPES
from megatron_r1.train.adamw import RestingMomentsAdamW

BUCKET = 40_000_000
"""Weights that are summed up at a time where that overlaps with the backward pass; megatron-core's own number."""
MOMENTS = ("exp_avg", "exp_avg_sq")


class Optimizer:
    """AdamW over a model's gradient buffers.

    Attributes:
        chunks: the rank's parts of the model, wrapped so that backward passes fill their gradient buffers.
    """

    def __init__(self, model: Model, train: TrainConfig, performance: PerformanceConfig | None = None):
        """
        Args:
            model: parameters that need no gradient are left alone.
            train: optimizer and schedule settings.
            performance: what is overlapped; None is nothing.
        """
        self.chunks = [_with_gradient_buffers(part, performance or PerformanceConfig()) for part in chunks(model)]
        if performance and performance.overlap_gradient_reduction:
            # Only the last micro-batch's backward pass finds gradients complete.
            waiting = [chunk.no_sync for chunk in self.chunks]
            model.config.no_sync_func = waiting if len(waiting) > 1 else waiting[0]
        settings = train.optimizer
        self._offloads = settings.offload
        config = MegatronOptimizerConfig(
            optimizer="adam",
            lr=train.schedule.learning_rate,
            weight_decay=settings.weight_decay,
            adam_beta1=settings.beta1,
            adam_beta2=settings.beta2,
            adam_eps=settings.epsilon,
            clip_grad=settings.clip_norm,
            bf16=model.config.bf16,
            params_dtype=model.config.params_dtype,
            use_distributed_optimizer=True,
        )
        self._inner = get_megatron_optimizer(config, self.chunks, get_standard_config_overrides(config))
        if settings.moment_precision != "fp32" or settings.offload:
            for part in self._parts():
                part.optimizer = RestingMomentsAdamW(
                    part.optimizer.param_groups, DTYPES[settings.moment_precision], "cpu" if settings.offload else None
                )
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}

    def zero_gradients(self) -> None:
        """Clear the gradient buffers."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self._inner.zero_grad()

    def gradients_finite(self) -> bool:
        """Whether this rank's gradient buffers hold only finite numbers."""
        return all(bool(torch.isfinite(buffer.grad_data.sum())) for buffer in self.buffers())

    def buffers(self) -> Iterator[Any]:
        """megatron-core's gradient buffers of this rank."""
        for chunk in self.chunks:
            yield from (*chunk.buffers, *chunk.expert_parallel_buffers)

    def step(self, learning_rate: float) -> float:
        """Clip, then update the parameters.

        Returns:
            Global gradient norm before clipping.
        """
        for optimizer in self._parts():
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * group.get("lr_mult", 1.0)
        _, norm, _ = self._inner.step()
        return float(norm or 0.0)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """This rank's part of the state: ``exp_avg/``, ``exp_avg_sq/``, ``step/`` and the parameter's name.

        With bf16 weights ``master/`` holds the fp32 copies that are stepped.
        """
        for part, name, weight_N, is_copy in self._weights():
            if is_copy:
                yield f"master/{name}", weight_N
            for key, value in part.optimizer.state.get(weight_N, {}).items():
                yield f"{key}/{name}", torch.as_tensor(value)

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `tensors` gave on this rank; every entry must be there, or none before the first update."""
        updated = any(key.startswith("step/") for key in tensors)
        for part, name, weight_N, is_copy in self._weights():
            if is_copy:
                weight_N.data.copy_(tensors[f"master/{name}"])
            if updated:
                place = "cpu" if self._offloads else weight_N.device
                state = {key: tensors[f"{key}/{name}"].clone().to(place) for key in MOMENTS}
                part.optimizer.state[weight_N] = state | {"step": tensors[f"step/{name}"].clone()}

    def _parts(self) -> list[DistributedOptimizer]:
        return getattr(self._inner, "chained_optimizers", [self._inner])

    def _weights(self) -> Iterator[tuple[DistributedOptimizer, str, Tensor, bool]]:
        """What this rank steps, [N] numbers of a parameter: a view of fp32 weights, or an fp32 copy of bf16 ones."""
        for part in self._parts():
            for parameters, weights, is_copy in (
                (part.model_fp32_groups, part.shard_fp32_groups, False),
                (part.model_float16_groups, part.shard_fp32_from_float16_groups, True),
            ):
                for parameter, weight_N in zip(chain(*parameters), chain(*weights), strict=True):
                    yield part, self._names[id(parameter)], weight_N, is_copy


def _with_gradient_buffers(model: GPTModel, performance: PerformanceConfig) -> DistributedDataParallel:
    """The model wrapped so that backward passes fill buffers, of which data-parallel ranks sum up one part each."""
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=model.config.bf16,
        use_distributed_optimizer=True,
        overlap_grad_reduce=performance.overlap_gradient_reduction,
        overlap_param_gather=performance.overlap_parameter_gather,
    )
    ranks = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    layout = DistributedOptimizer.compute_full_param_layout(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        max(BUCKET, ranks * BUCKET // 40) if performance.overlap_gradient_reduction else None,
        ranks,
        settings,
        parallel_state.get_expert_data_parallel_world_size(),
    )
    return DistributedDataParallel(model.config, settings, model, full_param_layout=layout)
