"""The optimizer: megatron-core's distributed one, over its gradient buffers.

Its state is divided among data-parallel ranks (ZeRO stage 1): each rank reduces, updates and stores one part of every
buffer, and the new weights are gathered. `optimizer_state` saves and restores the state.

Adam itself is torch's, or Transformer Engine's or Apex's FusedAdam where megatron-core finds one; with moments in
another type or in host memory it is this project's (`adamw`). What shortens the way on a CPU is for torch's alone, so
that FusedAdam has, on a CPU in tests, the way that it has on CUDA.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import (
    USING_PYTORCH_OPTIMIZER,
    clip_grads,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.utils import local_multi_tensor_applier
from torch import Tensor

from megatron_r1.config.performance import PerformanceConfig
from megatron_r1.config.train import TrainConfig
from megatron_r1.model.chunks import Model, chunks
from megatron_r1.model.fused import GRADIENT_BUFFER
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
        self._own_sums: list[Tensor] = []
        for chunk in self.chunks:
            for group in (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups):
                _sum_before_exchange(group, self._own_sums)
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
        self._inner = get_megatron_optimizer(
            config, self.chunks, get_standard_config_overrides(config), use_gloo_process_groups=False
        )
        for group in (group for part in self._parts() for group in part.optimizer.param_groups):
            # Norms have a multiplier of 0, which megatron-core's own schedule, not used here, would apply.
            group["weight_decay"] = settings.weight_decay * group.get("wd_mult", 1.0)
        self._in_place = [part for part in self._parts() if _is_in_place(part)]
        for part in self._in_place:
            _keep_in_place(part)
        _clip_without_copies()
        rounded = settings.moments_dtype == "bf16"
        # Moments have the type of the weights that they update, which is at least fp32.
        weights_dtype = torch.promote_types(model.config.params_dtype, torch.float32)
        self.moments_dtype = torch.bfloat16 if rounded else weights_dtype
        self.moments_device = "cpu" if settings.offload else None
        if rounded or settings.offload:
            for part in self._parts():
                groups = part.optimizer.param_groups
                part.optimizer = OffloadedMomentsAdamW(groups, self.moments_dtype, self.moments_device)
        else:
            for group in (group for part in self._parts() for group in part.optimizer.param_groups):
                if _torch_on_cpu(group["params"]):
                    group["fused"] = True  # torch's AdamW goes tensor by tensor, unless told

    def zero_gradients(self) -> None:
        """Clear the gradient buffers."""
        self._own_sums.clear()
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        for part in self._parts():
            if part not in self._in_place:
                part.zero_grad()

    def gradients_finite(self) -> bool:
        """Whether this rank's gradient buffers hold only finite numbers."""
        return all(bool(torch.isfinite(buffer.grad_data.sum())) for buffer in self.buffers())

    def own_gradients_finite(self) -> bool:
        """The same of the gradients before data-parallel ranks exchanged them: what this rank itself computed."""
        return (
            all(bool(torch.isfinite(total)) for total in self._own_sums) if self._own_sums else self.gradients_finite()
        )

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

    def set_num_updates(self, updates: int) -> None:
        """Restore the number of updates in the moments, by which Adam corrects their bias.

        torch's AdamW counts them for each parameter that has moments, FusedAdam for each group of parameters.
        """
        for optimizer in (part.optimizer for part in self._parts()):
            for group in optimizer.param_groups:
                if not isinstance(optimizer, torch.optim.AdamW):
                    group["step"] = updates
                    continue
                for state in filter(None, map(optimizer.state.get, group["params"])):
                    state["step"] = torch.tensor(float(updates))

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
        # Else megatron-core would reduce a gradient before the late backward pass of its weight has written it.
        delay_wgrad_compute=performance.delay_wgrad_compute,
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
    wrapped = DistributedDataParallel(model.config, settings, model, full_param_layout=layout)
    if _torch_on_cpu(wrapped.params_with_grad) and not performance.overlap_grad_reduce:
        for group in (*wrapped.bucket_groups, *wrapped.expert_parallel_bucket_groups):
            _leave_out_exchange_of_one_rank(group)
        for parameter in wrapped.params_with_grad:
            if parameter.main_grad.dtype == parameter.dtype:
                setattr(parameter, GRADIENT_BUFFER, parameter.main_grad)
    return wrapped


def _torch_on_cpu(tensors: Iterable[Tensor]) -> bool:
    return USING_PYTORCH_OPTIMIZER and all(tensor.device.type == "cpu" for tensor in tensors)


def _sum_before_exchange(group: Any, sums: list[Tensor]) -> None:
    """Note the sum of each bucket's gradients, on the device, when ranks begin to exchange them; then all have NaN."""
    exchange = group.start_grad_sync
    if group.intra_distributed_optimizer_instance_size == 1:
        return

    def start_grad_sync(*args: Any, **more: Any) -> Any:
        sums.extend(bucket.grad_data.sum() for bucket in group.buckets)
        return exchange(*args, **more)

    group.start_grad_sync = start_grad_sync


def _leave_out_exchange_of_one_rank(buckets: Any) -> None:
    """Let a data-parallel group of one rank not copy its gradients and weights onto themselves."""
    if buckets.intra_distributed_optimizer_instance_size > 1:
        return
    buckets.start_param_sync = lambda **_: None
    if all(bucket.gradient_scaling_factor == 1.0 for bucket in buckets.buckets):
        buckets.start_grad_sync = buckets.finish_grad_sync = lambda **_: None


def _is_in_place(part: DistributedOptimizer) -> bool:
    """Whether the weights that a CPU updates are those of the model, in fp32."""
    return not any(part.model_float16_groups) and _torch_on_cpu(chain(*part.shard_fp32_groups))


def _keep_in_place(part: DistributedOptimizer) -> None:
    """Let weights and gradients that are views of the buffers be that for good.

    megatron-core makes the views anew, and copies each onto itself, in every step.
    """
    part.zero_grad()  # what earlier backward passes left in the parameters
    part._copy_model_grads_to_main_grads()
    part._copy_model_grads_to_main_grads = part._copy_main_params_to_model_params = lambda: None


def _clip_without_copies() -> None:
    """Let megatron-core, where it has no kernel of Transformer Engine or Apex, call torch's for lists of tensors."""
    if clip_grads.multi_tensor_applier is local_multi_tensor_applier:
        clip_grads.l2_norm_impl, clip_grads.multi_tensor_scale_impl = _norm, _scale


def _norm(_: int, __: Tensor, lists: list[list[Tensor]], *___: bool) -> tuple[Tensor, None]:
    norms = torch.stack(torch._foreach_norm(lists[0]))
    return torch.linalg.vector_norm(norms).to(torch.float32).view(1), None


def _scale(_: int, __: Tensor, lists: list[list[Tensor]], factor: float) -> None:
    """Both lists are the same gradients."""
    torch._foreach_mul_(lists[1], factor)
