"""One optimizer update: passes over micro-batches, a check for finite gradients on all ranks, the optimizer's step."""

from __future__ import annotations

import logging
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch.distributed as dist
from torch import Tensor

from megatron_r1.errors import Diverged
from megatron_r1.model.chunks import Model
from megatron_r1.model.forward_backward import Forward, LossFunction, PassResults, forward_backward, routers
from megatron_r1.parallel import comm
from megatron_r1.parallel.mesh import data_parallel_group
from megatron_r1.parallel.phases import current, phase
from megatron_r1.train.optimizer import Optimizer

logger = logging.getLogger(__name__)

Reduce = Literal["mean", "sum"]
"""How losses and logged values of micro-batches and data-parallel ranks are reduced to those of the whole batch."""


@dataclass(frozen=True)
class UpdateResult:
    """Result of one update."""

    passes: PassResults
    gradient_norm: float
    """Global norm before clipping; not a number when the update was skipped."""
    skipped: bool
    """Whether a gradient was not finite, so that no weight changed."""
    reduce: Reduce = "mean"


@phase("update")
def update(
    model: Model,
    optimizer: Optimizer,
    micro_batches: Sequence[Any],
    forward: Forward,
    learning_rate: float,
    length: int,
    micro_batch_size: int = 1,
    reduce: Reduce = "mean",
) -> UpdateResult:
    """Run one optimizer update over `micro_batches`.

    A gradient that is not finite on any rank leaves weights, moments and router bias as they were on all of them.

    Args:
        model: the bare model; the optimizer holds its wrapped form.
        micro_batches: what `forward` takes, one forward pass each.
        forward: runs the model on a micro-batch.
        learning_rate: of this update.
        length: longest sequence of the micro-batches, in tokens.
        micro_batch_size: sequences of a micro-batch, see `forward_backward`.
        reduce: whether the batch's loss is the mean or the sum of its micro-batches' on all data-parallel ranks.
    """
    # megatron-core averages over micro-batches and data-parallel ranks.
    scale = len(micro_batches) * dist.get_world_size(data_parallel_group()) if reduce == "sum" else 1
    optimizer.zero_gradients()
    biases = [(router, router.expert_bias.clone()) for router in routers(model)]
    passes = forward_backward(model, optimizer.chunks, micro_batches, _scaled(forward, scale), length, micro_batch_size)
    if comm.all_ranks(optimizer.gradients_finite()):
        with phase("optimizer"):
            norm = optimizer.step(learning_rate)
        return UpdateResult(passes, norm, skipped=False, reduce=reduce)
    name_ranks(optimizer.own_gradients_finite())
    for router, bias in biases:
        router.expert_bias.copy_(bias)
    return UpdateResult(passes, float("nan"), skipped=True, reduce=reduce)


def name_ranks(finite: bool) -> None:
    """Collective: log on which ranks gradients were not finite.

    Args:
        finite: whether this rank's own gradients were, before ranks exchanged them.
    """
    hosts = comm.all_gather_object("" if finite else socket.gethostname())
    if dist.get_rank() == 0:
        names = ", ".join(f"rank {rank} on {host}" for rank, host in enumerate(hosts) if host)
        where = names or "no rank before their reduction, and of all after it"
        logger.warning("%s: gradients of %s are not finite; the update is skipped", current().place, where)


def _scaled(forward: Forward, scale: int) -> Forward:
    """The same forward with the loss multiplied, in a new tensor: megatron-core divides the loss in place."""

    def scaled(model: Any, micro_batch: Any) -> tuple[Any, LossFunction]:
        output, loss_function = forward(model, micro_batch)

        def scaled_loss(output: Any) -> tuple[Tensor, dict[str, Tensor]]:
            loss, logged = loss_function(output)
            return loss.clone() if scale == 1 else loss * scale, logged

        return output, scaled_loss

    return scaled


def count_skips(skipped_in_row: int, skipped: bool, allowed: int, step: int) -> int:
    """Number of consecutive skipped updates after this one.

    Raises:
        Diverged: more than `allowed` in a row.
    """
    if not skipped:
        return 0
    if skipped_in_row + 1 > allowed:
        raise Diverged(
            f"step {step}: gradients were not finite {skipped_in_row + 1} updates in a row "
            f"(train.max_skipped_steps={allowed}); weights are those of the last finite update"
        )
    return skipped_in_row + 1
