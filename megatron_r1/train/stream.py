"""Next-token prediction on plain sequences with a loss on every target."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_r1.model.forward_backward import LossFunction
from megatron_r1.parallel.context import context_parallel_group, positions_of, share_of_sequence


class StreamReader:
    """Turns batches of sequences into micro-batches and runs the model on one."""

    def __init__(self, device: str):
        self._device = device

    def micro_batches(self, batch: np.ndarray, rank: int, ranks: int, size: int) -> Sequence[Tensor]:
        """This data-parallel rank's share of a global batch, `size` sequences each: [B, L + 1]."""
        tokens_BL = torch.from_numpy(batch)[rank::ranks].to(self._device)
        return torch.split(tokens_BL, size)

    def forward(self, model: Any, tokens_BL: Tensor) -> tuple[Tensor, LossFunction]:
        """Cross-entropy of all targets."""
        return next_token_forward(model, tokens_BL)


def next_token_forward(model: Any, tokens_BL: Tensor) -> tuple[Tensor, LossFunction]:
    """Mean cross-entropy of each token given those before it in its sequence; inputs are all but the last token."""
    inputs_BL, labels_BL = tokens_BL[:, :-1].contiguous(), tokens_BL[:, 1:].contiguous()
    positions_BL = positions_of(inputs_BL)
    inputs_BL, labels_BL, positions_BL = map(share_of_sequence, (inputs_BL, labels_BL, positions_BL))
    context_ranks = dist.get_world_size(context_parallel_group())

    def loss_function(output_BL: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss = output_BL.float().mean()
        return loss / context_ranks, {"train/loss": loss.detach()}

    return model(inputs_BL, positions_BL, None, labels=labels_BL), loss_function
