"""Routing replay (R3): routers take the experts that they are told, and weigh them by their own scores.

An engine and a trainer that compute in other orders, or in bf16, now and then choose other experts for a token, which
moves its log-probability by far more than rounding does. Told the engine's choice, the trainer's router computes the
gates of those experts anew, with gradient ("Stabilizing MoE Reinforcement Learning by Aligning Training and Inference
Routers", 2025). megatron-core asks a `RouterReplay` in each router which experts to take; this is one.

Multi-token layers are left out by name: megatron-core numbers them from 1 again, like the backbone's.

Shapes: B rows, L positions, T = L x B tokens, N sparse layers of the backbone, K experts of a token, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction
from torch import Tensor

from megatron_r1.model.chunks import Model, chunks, in_multi_token_layer

NOT_RECORDED = -1
"""In place of an expert: the router chooses for itself, as for padding."""

Choose = Callable[..., tuple[Tensor, Tensor]]


class ReplayedRouting(RouterReplay):
    """One router's: what it is told, and how often it would have chosen otherwise."""

    def __init__(self, own: Any | None):
        """
        Args:
            own: what stands in the router already and chooses; None leaves that to megatron-core.
        """
        super().__init__()
        # The class keeps a list of all instances of the process, for switches that this package does not use.
        RouterReplay.global_router_replay_instances.remove(self)
        self._own = own
        self.replayed = self.mismatches = 0

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: Any = None,
    ) -> tuple[Tensor, Tensor]:
        """Scores [T, K] and numbers [T, K] of the experts to take, from scores [T, E]."""
        choose: Choose = default_compute_topk
        if self._own is not None:
            own = self._own

            def choose(*wanted: Any, **named: Any) -> tuple[Tensor, Tensor]:
                return own.get_replay_topk(*wanted, *named.values(), default_compute_topk)

        if self.router_replay_action in (None, RouterReplayAction.RECORD):
            return super().get_replay_topk(scores, topk, num_groups, group_topk, choose)
        again = self.router_replay_action == RouterReplayAction.REPLAY_BACKWARD
        replayed_TK = (self.replay_backward_list.pop(0) if again else self.target_topk_idx).to(scores.device)
        _, own_TK = choose(scores, topk, num_groups, group_topk)
        known_T = replayed_TK[:, 0] != NOT_RECORDED
        if not again:
            same_TK = (own_TK[:, :, None] == replayed_TK[:, None, :]).any(-1)
            self.replayed += topk * int(known_T.sum())
            self.mismatches += int((~same_TK & known_T[:, None]).sum())
        taken_TK = torch.where(known_T[:, None], replayed_TK, own_TK)
        return scores.gather(1, taken_TK), taken_TK


class RoutingReplay:
    """The routers of this rank's share of the backbone."""

    def __init__(self, model: Model, first_dense: int):
        """
        Args:
            first_dense: layers before the first sparse one.
        """
        self._choices: dict[int, ReplayedRouting] = {}
        for part in chunks(model):
            for name, module in part.named_modules():
                if isinstance(module, TopKRouter) and not in_multi_token_layer(name):
                    part.config.moe_enable_routing_replay = True
                    module.router_replay = ReplayedRouting(module.router_replay)
                    module.router_replay.layer_number = module.layer_number
                    self._choices[module.layer_number - 1 - first_dense] = module.router_replay

    @contextmanager
    def replaying(self, experts_BLNK: Tensor, backward: bool) -> Iterator[None]:
        """A forward pass in which routers take these experts.

        Args:
            experts_BLNK: whole sequences, the same on all ranks that share them; `NOT_TOLD` lets the router choose.
            backward: a backward pass follows, which may compute this one once more; `done` ends that.
        """
        mine_LBNK = _this_ranks_positions(experts_BLNK.transpose(0, 1))
        for layer, choice in self._choices.items():
            replayed_TK = mine_LBNK[:, :, layer].flatten(0, 1)
            choice.target_topk_idx = replayed_TK
            if backward:
                choice.replay_backward_list.append(replayed_TK)
        self._act(RouterReplayAction.REPLAY_FORWARD)
        try:
            yield
        finally:
            # What recomputes in the backward passes comes in the order of the forward passes.
            self._act(RouterReplayAction.REPLAY_BACKWARD if backward else None)

    def done(self) -> None:
        """The backward passes are over: routers choose for themselves again."""
        self._act(None)
        for choice in self._choices.values():
            choice.clear_indices()

    def count(self) -> tuple[int, int]:
        """Choices told since the last count, and those that this rank's routers would have made otherwise."""
        replayed = sum(choice.replayed for choice in self._choices.values())
        mismatches = sum(choice.mismatches for choice in self._choices.values())
        for choice in self._choices.values():
            choice.replayed = choice.mismatches = 0
        return replayed, mismatches

    @contextmanager
    def recording(self) -> Iterator[Callable[[], Tensor]]:
        """Forward passes whose choices can be read, each by calling what is given: [T, N, K] of the last pass."""
        self._act(RouterReplayAction.RECORD)
        try:
            yield lambda: torch.stack(
                [self._choices[layer].get_recorded_indices() for layer in sorted(self._choices)], 1
            )
        finally:
            self.done()

    def _act(self, action: RouterReplayAction | None) -> None:
        for choice in self._choices.values():
            choice.router_replay_action = action


def _this_ranks_positions(experts_LBNK: Tensor) -> Tensor:
    """With tensor parallelism a router sees its rank's share of the positions (sequence parallelism)."""
    ranks = parallel_state.get_tensor_model_parallel_world_size()
    return experts_LBNK.chunk(ranks)[parallel_state.get_tensor_model_parallel_rank()]
