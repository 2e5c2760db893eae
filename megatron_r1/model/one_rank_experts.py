"""Routed experts where one rank holds all of them whole: nothing is exchanged, and no copy is sorted twice."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.moe.experts import TEGroupedMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch import Tensor

from megatron_r1.model.fused import Copies, grouped_linear, weighted_swiglu


class GroupedFeedForward(TEGroupedMLP):  # type: ignore[misc]
    """megatron-core's grouped experts, in three nodes of autograd."""

    def forward(self, x_ND: Tensor, tokens_per_expert: Tensor, weight_N: Tensor, **more: Any) -> tuple[Tensor, None]:
        first, second = self.linear_fc1, self.linear_fc2
        if not (first.is_plain and second.is_plain) or self.activation_recompute or more:
            output: tuple[Tensor, None] = super().forward(x_ND, tokens_per_expert, weight_N, **more)
            return output
        counts = tokens_per_expert.tolist()
        active_NF = weighted_swiglu(grouped_linear(x_ND, counts, first.weights()), weight_N)
        return grouped_linear(active_NF, counts, second.weights()), None


class OneRankDispatcher(MoEAlltoAllTokenDispatcher):  # type: ignore[misc]
    """Sorts tokens by expert, and sums what their experts gave; there is no other rank to send to."""

    def dispatch_preprocess(
        self, hidden_LBD: Tensor, routing_map_TE: Tensor, probs_TE: Tensor
    ) -> tuple[Tensor, Tensor]:
        self.hidden_shape = hidden_LBD.shape
        self.copies = Copies(routing_map_TE)
        weight_N = probs_TE[self.copies.token_N, self.copies.expert_N]
        return self.copies.gather(hidden_LBD.view(-1, hidden_LBD.shape[-1])), weight_N

    def token_dispatch(self, x_ND: Tensor, weight_N: Tensor) -> tuple[Tensor, Tensor]:
        return x_ND, weight_N

    def dispatch_postprocess(self, x_ND: Tensor, weight_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return x_ND, self.copies.counts_E, weight_N

    def combine_preprocess(self, x_ND: Tensor) -> Tensor:
        return x_ND

    def token_combine(self, x_ND: Tensor, **_: Any) -> Tensor:
        return x_ND

    def combine_postprocess(self, x_ND: Tensor) -> Tensor:
        return self.copies.sum(x_ND).view(self.hidden_shape)


def use_one_rank_dispatch(model: torch.nn.Module) -> None:
    """Let the sparse layers of a model dispatch within this rank, where it holds all experts whole."""
    for layer in (module for module in model.modules() if isinstance(module, MoELayer)):
        dispatcher = layer.token_dispatcher
        if type(dispatcher) is MoEAlltoAllTokenDispatcher and dispatcher.tp_size == dispatcher.ep_size == 1:
            dispatcher.__class__ = OneRankDispatcher
