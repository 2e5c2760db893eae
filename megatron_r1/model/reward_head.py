"""The scalar head of a reward model: one number per row, from the last hidden state of one of its tokens.

Every rank of the last pipeline stage holds the head whole. Under sequence parallelism its tensor-parallel ranks first
put their hidden states together; each then computes the same score, and the backward pass gives every rank its own
positions' gradient once.

Shapes: L positions, B rows, D model width.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_r1.model.chunks import Model, chunks

HEAD = "reward_head"


class RewardHead(torch.nn.Module):
    """An affine map from a hidden state to a score; zero at first, so that it prefers no order."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1, config.hidden_size, dtype=config.params_dtype))
        self.bias = torch.nn.Parameter(torch.zeros(1, dtype=config.params_dtype))
        self._shared = config.sequence_parallel

    def forward(self, hidden_LBD: Tensor, places_B: Tensor) -> Tensor:
        """Scores [B] in fp32.

        Args:
            hidden_LBD: after the final norm; under sequence parallelism this rank's positions.
            places_B: position of the token that is read in each row.
        """
        hidden_LBD = self._whole(hidden_LBD)
        return self._scores(hidden_LBD[places_B, torch.arange(hidden_LBD.shape[1], device=hidden_LBD.device)])

    def everywhere(self, hidden_LBD: Tensor) -> Tensor:
        """Scores [B, L] in fp32, of every position; the same hidden states as for `forward`."""
        return self._scores(self._whole(hidden_LBD)).transpose(0, 1)

    def _whole(self, hidden_LBD: Tensor) -> Tensor:
        if not self._shared:
            return hidden_LBD
        whole_LBD: Tensor = gather_from_sequence_parallel_region(hidden_LBD, tensor_parallel_output_grad=False)
        return whole_LBD

    def _scores(self, read: Tensor) -> Tensor:
        return F.linear(read.float(), self.weight.float(), self.bias.float())[..., 0]


def add_reward_head(model: Model) -> None:
    """Give the model's last stage a head."""
    for part in chunks(model):
        if part.post_process:
            device = next(part.parameters()).device
            part.add_module(HEAD, RewardHead(part.config).to(device))


def head_of(model: Model) -> RewardHead:
    """The head of a model whose last stage is on this rank."""
    head: RewardHead = getattr(chunks(model)[-1], HEAD)
    return head


def with_head(tensors: Mapping[str, Tensor], hidden_size: int) -> Mapping[str, Tensor]:
    """Whole tensors of a model, its head among them: its own where it has one, else a new one."""
    first = {f"{HEAD}.weight": torch.zeros(1, hidden_size), f"{HEAD}.bias": torch.zeros(1)}
    new = {name: tensor for name, tensor in first.items() if name not in tensors}
    return ChainMap(new, tensors)  # type: ignore[arg-type]  # nothing is written to either
