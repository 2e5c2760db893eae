"""One optimizer update: forward and backward over micro-batches, a check that all ranks share, the update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper
from torch import Tensor

from megatron_r1.parallel import comm
from megatron_r1.train.optimizer import Optimizer

LossFunction = Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]
"""Model output -> (loss, what to log); the loss is averaged over micro-batches."""
Forward = Callable[[GPTModel, Any], tuple[Tensor, LossFunction]]
"""Model and micro-batch -> (output, loss function)."""


@dataclass(frozen=True)
class UpdateResult:
    """What one update did."""

    logged: list[dict[str, Tensor]]
    """What the loss function logged, a dictionary per micro-batch."""
    gradient_norm: float
    """Global norm before clipping; not a number when the update was skipped."""
    skipped: bool
    """Whether a gradient was not finite, so that nothing changed."""
    expert_load_LE: Tensor | None
    """Tokens per expert (E) of each sparse layer (L) in this update."""
    mtp_loss: float | None
    """Mean loss of the extra predictions."""


def update(
    model: GPTModel,
    optimizer: Optimizer,
    micro_batches: Sequence[Any],
    forward: Forward,
    learning_rate: float,
    sequence_length: int,
) -> UpdateResult:
    """Run one optimizer update over `micro_batches`.

    A gradient that is not finite on any rank leaves weights, moments and router bias as they were on all of them.

    Args:
        model: the bare model; the optimizer holds its wrapped form.
        micro_batches: what `forward` takes, one forward pass each.
        forward: runs the model on a micro-batch.
        learning_rate: of this update.
        sequence_length: longest sequence of the micro-batches, in tokens (pipeline buffers need it).
    """
    optimizer.zero_gradients()
    loads: list[Tensor] = []
    biases = {module: module.expert_bias.clone() for module in routers(model)}

    def finalise(models: list, num_tokens: Tensor | None = None, **kwargs: Any) -> None:
        # The routers' counters are cleared by finalize_model_grads.
        loads.extend(module.local_tokens_per_expert.clone() for module in biases)
        finalize_model_grads(models, num_tokens, **kwargs)

    model.config.finalize_model_grads_func = finalise
    logged = get_forward_backward_func()(
        forward_step_func=lambda batches, module: forward(module, next(batches)),
        data_iterator=iter(micro_batches),
        model=optimizer.model,
        num_microbatches=len(micro_batches),
        seq_length=sequence_length,
        micro_batch_size=1,
        forward_only=False,
    )
    mtp_loss = _take_mtp_loss(len(micro_batches))
    skipped = not comm.all_ranks(optimizer.gradients_finite())
    if skipped:
        for module, bias in biases.items():
            module.expert_bias.copy_(bias)
        norm = float("nan")
    else:
        norm = optimizer.step(learning_rate)
    return UpdateResult(logged, norm, skipped, torch.stack(loads) if loads else None, mtp_loss)


def routers(model: GPTModel) -> list[torch.nn.Module]:
    """The routers that hold a balancing bias, backbone first, then multi-token prediction."""
    return [module for module in model.modules() if getattr(module, "expert_bias", None) is not None]


def _take_mtp_loss(num_micro_batches: int) -> float | None:
    """Mean loss of the extra predictions since the last call."""
    losses = MTPLossLoggingHelper.tracker.get("loss_values")
    if losses is None:
        return None
    value = float(losses.mean()) / num_micro_batches
    MTPLossLoggingHelper.clean_metrics_in_tracker()
    return value
