"""Forward and backward passes over micro-batches, by megatron-core's schedule for the layout at hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper
from torch import Tensor

from megatron_r1.config.pipeline_stages import fitting_group_size
from megatron_r1.model.chunks import Model, chunks
from megatron_r1.model.pass_timers import pass_timers

LossFunction = Callable[[Any], tuple[Tensor, dict[str, Tensor]]]
"""Model output -> (loss, what to log); the loss is averaged over micro-batches."""
Forward = Callable[[Any, Any], tuple[Any, LossFunction]]
"""Model and micro-batch -> (output, loss function)."""


@dataclass(frozen=True)
class PassResults:
    """What the forward and backward passes over some micro-batches gave, besides gradients."""

    logged: list[dict[str, Tensor]]
    """What the loss function logged, a dictionary per micro-batch."""
    expert_load: dict[str, Tensor]
    """Tokens per expert [E] of each sparse layer on any pipeline stage whose router has a balancing bias: "layer 2",
    counted from 1 as megatron-core does, and "mtp 1" for those of multi-token prediction, which come last."""
    mtp_loss: float | None
    """Mean loss of multi-token prediction, whichever pipeline stage holds it; None without."""


def forward_backward(
    model: Model,
    wrapped: Sequence[DistributedDataParallel],
    micro_batches: Sequence[Any],
    forward: Forward,
    length: int,
    micro_batch_size: int = 1,
) -> PassResults:
    """Fill the gradient buffers, summed over ranks as the layout asks, and step the routers' balancing bias.

    Args:
        model: the bare model.
        wrapped: each chunk of the model with its gradient buffers, which must be clear.
        micro_batches: what `forward` takes, one pass each.
        length: longest sequence of the micro-batches, in tokens.
        micro_batch_size: sequences of a micro-batch; with `length` it is the shape that interleaved stages expect from
            one another, so there all micro-batches must be alike. Other layouts send the shape along.
    """
    loads: dict[str, Tensor] = {}

    def finalise(models: list[Any], num_tokens: Tensor | None = None, **kwargs: Any) -> None:
        # finalize_model_grads clears the routers' counters.
        loads.update((layer_name(router), router.local_tokens_per_expert.clone()) for router in routers(model))
        finalize_model_grads(models, num_tokens, **kwargs)

    # megatron-core adds auxiliary losses up for the whole process, whatever model and passes they are of.
    destroy_moe_metrics_tracker()
    MTPLossLoggingHelper.tracker = {}
    model.config.finalize_model_grads_func = finalise
    model.config.timers = pass_timers(model)
    with _fitting_groups(model, len(micro_batches)):
        logged = get_forward_backward_func()(
            forward_step_func=partial(_forward_step, forward),
            data_iterator=[iter(micro_batches) for _ in wrapped],
            model=list(wrapped),
            num_microbatches=len(micro_batches),
            seq_length=length,
            micro_batch_size=micro_batch_size,
            forward_only=False,
        )
    of_stages = _all_gather_pipeline((_over_ranks(loads), _mtp_loss(len(micro_batches))))
    everywhere = {layer: load_E for loads, _ in of_stages for layer, load_E in loads.items()}
    in_order = {layer: everywhere[layer] for layer in sorted(everywhere, key=_layer_order)}
    return PassResults(logged, in_order, next((loss for _, loss in of_stages if loss is not None), None))


def _forward_step(
    forward: Forward, batches: Iterator[Any], part: Any, return_schedule_plan: bool = False
) -> tuple[Any, LossFunction]:
    """Run a part of the model on the next micro-batch, or plan to.

    megatron-core runs a plan beside another micro-batch's backward pass, so that expert traffic overlaps with
    computation: what `forward` changes around its call of the model is undone by then.
    """
    return forward(part.build_schedule_plan if return_schedule_plan else part, next(batches))


@contextmanager
def _fitting_groups(model: Model, passes: int) -> Iterator[None]:
    """Meanwhile the model's interleaved stages take micro-batches in groups of a size that so many passes allow."""
    config = model.config
    configured = config.microbatch_group_size_per_vp_stage
    fitting = fitting_group_size(configured, config.pipeline_model_parallel_size, passes)
    config.microbatch_group_size_per_vp_stage = fitting or configured
    try:
        yield
    finally:
        config.microbatch_group_size_per_vp_stage = configured


def _over_ranks(loads: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tokens per expert summed over the data-parallel, context-parallel and tensor-parallel ranks."""
    if not loads:
        return {}
    total_LE = torch.stack([*loads.values()])
    group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
    torch.distributed.all_reduce(total_LE, group=group)
    return dict(zip(loads, total_LE.cpu(), strict=True))


def _all_gather_pipeline[Value](value: Value) -> list[Value]:
    """Collective over the pipeline stages that work on the same data: each one's value, in stage order."""
    group = parallel_state.get_pipeline_model_parallel_group()
    values: list[Any] = [value] * group.size()
    if group.size() > 1:
        torch.distributed.all_gather_object(values, value, group=group)
    return values


def _layer_order(name: str) -> tuple[str, int]:
    """Sorts the backbone's layers by number, and multi-token layers after them."""
    kind, number = name.split()
    return kind, int(number)


def routers(model: Model) -> list[Any]:
    """The routers that hold a balancing bias, backbone first, then multi-token prediction."""
    return [module for module in model.modules() if isinstance(module, TopKRouter) and module.expert_bias is not None]


def layer_name(router: Any) -> str:
    """The layer of a router; multi-token layers are numbered separately from the backbone's."""
    return f"{'mtp' if router.is_mtp_layer else 'layer'} {router.layer_number}"


def _mtp_loss(num_micro_batches: int) -> float | None:
    """Mean multi-token-prediction loss of these passes, over data-parallel ranks; None but on their stage."""
    tracker = MTPLossLoggingHelper.tracker
    group = tracker.get("avg_group")
    if group is None:
        return None
    mean = tracker["loss_values"].mean()
    torch.distributed.all_reduce(mean, group=group)
    return float(mean) / int(group.size()) / num_micro_batches


def packed_seq_params(bounds: Tensor) -> PackedSeqParams:
    """megatron-core's argument for several sequences end to end, [1, T], that do not attend to one another.

    Args:
        bounds: first token of each sequence, and T: int32 [N + 1].
    """
    longest = int(bounds.diff().max())
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def forward_only(
    model: Model,
    micro_batches: Sequence[Any],
    forward: Callable[[Any, Any], Any],
    length: int,
    micro_batch_size: int = 1,
) -> list[Any]:
    """Outputs of `forward`, one per micro-batch, without gradient; an empty list but on the last pipeline stage.

    Args:
        forward: model and micro-batch -> output of this stage, a tensor or a dictionary of tensors.
        length, micro_batch_size: as of `forward_backward`.
    """

    def step(batches: Any, module: Any) -> tuple[Any, Callable[..., Any]]:
        return forward(module, next(batches)), lambda output, non_loss_data: output

    model.config.timers = pass_timers(model)
    with torch.no_grad(), _fitting_groups(model, len(micro_batches)):
        outputs: list[Any] = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=[iter(micro_batches) for _ in chunks(model)],
            model=chunks(model),
            num_microbatches=len(micro_batches),
            seq_length=length,
            micro_batch_size=micro_batch_size,
            forward_only=True,
            collect_non_loss_data=True,
        )
    return outputs
