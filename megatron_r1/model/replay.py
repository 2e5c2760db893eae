"""Routing replay (R3): the trainer's routers take the experts that the engine recorded, with gates of their own.

An engine and a trainer that compute in another order, or in bf16, sometimes choose different experts for a token, which
moves its log-probability by far more than rounding does. Given the engine's choice, the trainer's router computes the
gates of those experts itself, with gradient ("Stabilizing MoE Reinforcement Learning by Aligning Training and Inference
Routers", 2025). megatron-core asks a `RouterReplay` in each router which experts to take; this is one.

Multi-token layers are excluded by name: megatron-core numbers them from 1 again, like the backbone's.

Shapes: B rows, L positions, T = L x B tokens, N sparse layers of the backbone, K experts of a token, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction
from torch import Tensor

from megatron_r1.model.chunks import Model, chunks
from megatron_r1.model.names import in_multi_token_layer
from megatron_r1.parallel.comm import sum_over_ranks

NOT_RECORDED = -1
"""Instead of an expert's index: the router makes its own choice, as for padding."""

Choose = Callable[..., tuple[Tensor, Tensor]]
Routes = Callable[[], Tensor]
"""Experts [T, N, K] that the routers took in the last forward pass."""


class Replay(Protocol):
    """Which experts the model's routers take."""

    def replaying(self, experts_BLNK: Tensor | None, backward: bool) -> AbstractContextManager[None]:
        """Around a forward pass whose routers take these experts; None lets them choose.

        Args:
            experts_BLNK: whole sequences, the same on all ranks that share them; `NOT_RECORDED` lets the router choose.
            backward: a backward pass follows, which may compute this one once more; `done` ends that.
        """
        ...

    def done(self) -> None:
        """The backward passes are over: routers choose for themselves again."""
        ...

    def metrics(self) -> dict[str, float]:
        """Collective: share of the replayed choices that the routers would make differently, since the last call."""
        ...

    def recording(self) -> AbstractContextManager[Routes | None]:
        """Forward passes whose choices can be read; None where they are not read."""
        ...


class NoReplay:
    """Routers choose for themselves."""

    def replaying(self, experts_BLNK: Tensor | None, backward: bool) -> AbstractContextManager[None]:
        return nullcontext()

    def done(self) -> None:
        pass

    def metrics(self) -> dict[str, float]:
        return {}

    def recording(self) -> AbstractContextManager[Routes | None]:
        return nullcontext()


class ReplayedRouting(RouterReplay):  # type: ignore[misc]
    """One router's replay: the experts to take, and how often the router itself would have chosen differently."""

    def __init__(self, own: Any | None):
        """
        Args:
            own: the replay that the router already has, which chooses; None leaves the choice to megatron-core.
        """
        super().__init__()
        # megatron-core lists all instances of the process, for switches that this package does not use.
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
                scores_topk: tuple[Tensor, Tensor] = own.get_replay_topk(*wanted, *named.values(), default_compute_topk)
                return scores_topk

        if self.router_replay_action in (None, RouterReplayAction.RECORD):
            chosen: tuple[Tensor, Tensor] = super().get_replay_topk(scores, topk, num_groups, group_topk, choose)
            return chosen
        again = self.router_replay_action == RouterReplayAction.REPLAY_BACKWARD
        replayed_TK = (self.replay_backward_list.pop(0) if again else self.target_topk_idx).to(scores.device)
        _, own_TK = choose(scores, topk, num_groups, group_topk)
        recorded_T = replayed_TK[:, 0] != NOT_RECORDED
        if not again:
            same_TK = (own_TK[:, :, None] == replayed_TK[:, None, :]).any(-1)
            self.replayed += topk * int(recorded_T.sum())
            self.mismatches += int((~same_TK & recorded_T[:, None]).sum())
        taken_TK = torch.where(recorded_T[:, None], replayed_TK, own_TK)
        return scores.gather(1, taken_TK), taken_TK


class RoutingReplay:
    """Replay in the routers of this rank's part of the backbone."""

    def __init__(self, model: Model, first_dense: int):
        """
        Args:
            first_dense: layers before the first sparse one.
        """
        self._routers: dict[int, ReplayedRouting] = {}
        for part in chunks(model):
            for name, module in part.named_modules():
                if isinstance(module, TopKRouter) and not in_multi_token_layer(name):
                    part.config.moe_enable_routing_replay = True
                    module.router_replay = ReplayedRouting(module.router_replay)
                    module.router_replay.layer_number = module.layer_number
                    self._routers[module.layer_number - 1 - first_dense] = module.router_replay

    @contextmanager
    def replaying(self, experts_BLNK: Tensor | None, backward: bool) -> Iterator[None]:
        if experts_BLNK is None:
            yield
            return
        mine_LBNK = _this_ranks_positions(experts_BLNK.transpose(0, 1))
        for layer, router in self._routers.items():
            replayed_TK = mine_LBNK[:, :, layer].flatten(0, 1)
            router.target_topk_idx = replayed_TK
            if backward:
                router.replay_backward_list.append(replayed_TK)
        self._act(RouterReplayAction.REPLAY_FORWARD)
        try:
            yield
        finally:
            # The backward passes recompute the forward passes in their order.
            self._act(RouterReplayAction.REPLAY_BACKWARD if backward else None)

    def done(self) -> None:
        self._act(None)
        for router in self._routers.values():
            router.clear_indices()

    def count(self) -> tuple[int, int]:
        """Choices replayed since the last count, and those that this rank's routers would have made differently."""
        replayed = sum(router.replayed for router in self._routers.values())
        mismatches = sum(router.mismatches for router in self._routers.values())
        for router in self._routers.values():
            router.replayed = router.mismatches = 0
        return replayed, mismatches

    def metrics(self) -> dict[str, float]:
        replayed, mismatches = self.count()
        found = sum_over_ranks("replay", {"replayed": replayed, "mismatches": mismatches})
        return {"mismatch/routing": found["mismatches"] / max(1, found["replayed"])}

    @contextmanager
    def recording(self) -> Iterator[Routes]:
        self._act(RouterReplayAction.RECORD)
        try:
            yield lambda: torch.stack(
                [self._routers[layer].get_recorded_indices() for layer in sorted(self._routers)], 1
            )
        finally:
            self.done()

    def _act(self, action: RouterReplayAction | None) -> None:
        for router in self._routers.values():
            router.router_replay_action = action


def _this_ranks_positions(experts_LBNK: Tensor) -> Tensor:
    """With tensor parallelism a router reads only its rank's part of the positions (sequence parallelism)."""
    ranks = parallel_state.get_tensor_model_parallel_world_size()
    rank: int = parallel_state.get_tensor_model_parallel_rank()
    return experts_LBNK.chunk(ranks)[rank]
