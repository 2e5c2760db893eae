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

from megatron_r1.config.train import TrainConfig
from megatron_r1.model.chunks import Model, chunks

MOMENTS = ("exp_avg", "exp_avg_sq")


class Optimizer:
    """AdamW over a model's gradient buffers.

    Attributes:
        chunks: the rank's parts of the model, wrapped so that backward passes fill their gradient buffers.
    """

    def __init__(self, model: Model, train: TrainConfig):
        """
        Args:
            model: parameters that need no gradient are left alone.
            train: optimizer and schedule settings.
        """
        self.chunks = [_with_gradient_buffers(part) for part in chunks(model)]
        settings = train.optimizer
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
                state = {key: tensors[f"{key}/{name}"].clone() for key in (*MOMENTS, "step")}
                part.optimizer.state[weight_N] = state

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


def _with_gradient_buffers(model: GPTModel) -> DistributedDataParallel:
    """The model wrapped so that backward passes fill buffers, of which data-parallel ranks sum up one part each."""
    # Without overlap the first flag's only effect is a type: bf16 gradients are summed in fp32, others as they are.
    settings = DistributedDataParallelConfig(grad_reduce_in_fp32=model.config.bf16, use_distributed_optimizer=True)
    layout = DistributedOptimizer.compute_full_param_layout(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        None,
        parallel_state.get_data_parallel_world_size(with_context_parallel=True),
        settings,
        parallel_state.get_expert_data_parallel_world_size(),
    )
    return DistributedDataParallel(model.config, settings, model, full_param_layout=layout)
