"""The optimizer: megatron-core's distributed one, over its gradient buffers.

Its state is divided among data-parallel ranks (ZeRO stage 1): each rank reduces, updates and stores one part of every
buffer, and the new weights are gathered. `optimizer_state` saves and restores the state.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any

import torch
import torch.distributed as dist
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
from megatron_r1.train.adamw import OffloadedMomentsAdamW

BUCKET = 40_000_000
"""Gradients that are reduced at a time where that overlaps with the backward pass; megatron-core's own number."""
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class ParamState:
    """A rank's part of the optimizer state of one parameter."""

    parameter: Tensor
    weight_N: Tensor
    """The weights that are updated: a view of fp32 weights, or an fp32 copy of bf16 weights."""
    optimizer: torch.optim.Optimizer
    """Optimizer with the moments of these weights."""


class Optimizer:
    """AdamW over a model's gradient buffers.

    Attributes:
        chunks: the rank's chunks of the model, wrapped so that backward passes fill their gradient buffers.
        moments_dtype: type of both moments between updates.
        moments_device: device of the moments between updates; None is the device of their parameter.
    """

    def __init__(self, model: Model, train: TrainConfig, performance: PerformanceConfig | None = None):
        """
        Args:
            model: parameters that need no gradient are not updated.
            train: optimizer and schedule settings.
            performance: settings of overlap; None overlaps nothing.
        """
        self.chunks = [_with_gradient_buffers(part, performance or PerformanceConfig()) for part in chunks(model)]
        if performance and performance.overlap_grad_reduce:
            # Gradients are complete only after the backward pass of the last micro-batch.
            waiting = [chunk.no_sync for chunk in self.chunks]
            model.config.no_sync_func = waiting if len(waiting) > 1 else waiting[0]
        settings = train.optimizer
        config = MegatronOptimizerConfig(
            optimizer="adam",
            lr=train.schedule.learning_rate,
            weight_decay=settings.weight_decay,
            adam_beta1=settings.beta1,
            adam_beta2=settings.beta2,
            adam_eps=settings.epsilon,
            clip_grad=settings.max_grad_norm,
            bf16=model.config.bf16,
            params_dtype=model.config.params_dtype,
            use_distributed_optimizer=True,
        )
        self._inner = get_megatron_optimizer(config, self.chunks, get_standard_config_overrides(config))
        rounded = settings.moments_dtype == "bf16"
        # Moments have the type of the weights that they update, which is at least fp32.
        weights_dtype = torch.promote_types(model.config.params_dtype, torch.float32)
        self.moments_dtype = torch.bfloat16 if rounded else weights_dtype
        self.moments_device = "cpu" if settings.offload else None
        if rounded or settings.offload:
            for part in self._parts():
                groups = part.optimizer.param_groups
                part.optimizer = OffloadedMomentsAdamW(groups, self.moments_dtype, self.moments_device)

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

    def param_states(self) -> Iterator[ParamState]:
        """This rank's part of the state of each parameter."""
        for part in self._parts():
            for parameters, weights in (
                (part.model_fp32_groups, part.shard_fp32_groups),
                (part.model_float16_groups, part.shard_fp32_from_float16_groups),
            ):
                for parameter, weight_N in zip(chain(*parameters), chain(*weights), strict=True):
                    yield ParamState(parameter, weight_N, part.optimizer)

    def ranges(self) -> Iterator[tuple[Tensor, dist.ProcessGroup, list[tuple[int, int]]]]:
        """Each parameter, the ranks among which its state is divided, and each rank's range of the flat parameter."""
        for buffer in self.buffers():
            ranks = dist.get_world_size(buffer.data_parallel_group)
            for parameter, (start, end, bucket) in buffer.param_index_map.items():
                begin = start - buffer.buckets[bucket].offset
                share = buffer.buckets[bucket].grad_data.numel() // ranks
                clamped = [min(max(rank * share - begin, 0), end - start) for rank in range(ranks + 1)]
                yield parameter, buffer.data_parallel_group, list(pairwise(clamped))

    def _parts(self) -> list[DistributedOptimizer]:
        return getattr(self._inner, "chained_optimizers", [self._inner])


def _with_gradient_buffers(model: GPTModel, performance: PerformanceConfig) -> DistributedDataParallel:
    """The model wrapped so that backward passes fill gradient buffers; each data-parallel rank reduces part of them."""
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=model.config.bf16,
        use_distributed_optimizer=True,
        overlap_grad_reduce=performance.overlap_grad_reduce,
        # Weights are gathered before a step ends, because hooks save and average them, and engines get them, after it.
        overlap_param_gather=False,
    )
    ranks = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    layout = DistributedOptimizer.compute_full_param_layout(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        max(BUCKET, ranks * BUCKET // 40) if performance.overlap_grad_reduce else None,
        ranks,
        settings,
        parallel_state.get_expert_data_parallel_world_size(),
    )
    return DistributedDataParallel(model.config, settings, model, full_param_layout=layout)
