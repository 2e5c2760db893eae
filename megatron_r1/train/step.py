"""One optimizer update: passes over micro-batches, a check that all ranks share, the update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_r1.model.forward_backward import Forward, PassResults, forward_backward, routers
from megatron_r1.parallel import comm
from megatron_r1.train.optimizer import Optimizer


@dataclass(frozen=True)
class UpdateResult:
    """What one update did."""

    passes: PassResults
    gradient_norm: float
    """Global norm before clipping; not a number when the update was skipped."""
    skipped: bool
    """Whether a gradient was not finite, so that nothing changed."""


def update(
    model: Any,
    optimizer: Optimizer,
    micro_batches: Sequence[Any],
    forward: Forward,
    learning_rate: float,
    length: int,
    rows: int = 1,
) -> UpdateResult:
    """Run one optimizer update over `micro_batches`.

    A gradient that is not finite on any rank leaves weights, moments and router bias as they were on all of them.

    Args:
        model: the bare model; the optimizer holds its wrapped form.
        micro_batches: what `forward` takes, one forward pass each.
        forward: runs the model on a micro-batch.
        learning_rate: of this update.
        length: longest sequence of the micro-batches, in tokens; rows: sequences of each, see `forward_backward`.
    """
    optimizer.zero_gradients()
    biases = [(router, router.expert_bias.clone()) for router in routers(model)]
    passes = forward_backward(model, optimizer.chunks, micro_batches, forward, length, rows)
    if comm.all_ranks(optimizer.gradients_finite()):
        return UpdateResult(passes, optimizer.step(learning_rate), skipped=False)
    for router, bias in biases:
        router.expert_bias.copy_(bias)
    return UpdateResult(passes, float("nan"), skipped=True)
