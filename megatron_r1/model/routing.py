"""Group-limited routing as DeepSeek's released code computes it.

Shapes: T tokens, E experts, G groups, K chosen experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor
from torch.nn.functional import linear

from megatron_r1.config.model import MoeConfig


class GroupChoice:
    """Chooses groups by the sum of each one's best scores, then experts among the chosen groups.

    Stands where megatron-core asks a routing replay which experts to take.
    """

    layer_number: int | None = None

    def __init__(self, best: int):
        """
        Args:
            best: how many of a group's experts speak for it.
        """
        self._best = best

    def get_replay_topk(
        self, scores_TE: Tensor, topk: int, num_groups: int, group_topk: int, default: Any = None
    ) -> tuple[Tensor, Tensor]:
        """Scores and indices [T, K] of the chosen experts."""
        scores_TGE = scores_TE.unflatten(1, (num_groups, -1))
        groups_TG = scores_TGE.topk(self._best, dim=-1).values.sum(-1)
        chosen_TG = torch.zeros_like(groups_TG, dtype=torch.bool)
        chosen_TG.scatter_(1, groups_TG.topk(group_topk, dim=-1, sorted=False).indices, True)
        open_TE = scores_TGE.masked_fill(~chosen_TG.unsqueeze(-1), float("-inf")).flatten(1)
        values_TK, indices_TK = open_TE.topk(topk, dim=-1)
        return values_TK, indices_TK


def choose_groups_as_released(model: torch.nn.Module, moe: MoeConfig) -> None:
    """Let the routers rank groups as the releases do: V3 by its best two experts, V2 by its best one.

    megatron-core takes the best top_k / group_top_k, which is the same for V3's own 8 experts of 4 groups, but not for
    V2's 6 of 3. Where all groups are open, or the two rules agree, megatron-core's own choice stays.
    """
    best = 2 if moe.score_function == "sigmoid" else 1
    if moe.group_top_k == moe.num_groups or moe.top_k // moe.group_top_k == best:
        return
    for router in (module for module in model.modules() if isinstance(module, TopKRouter)):
        router.router_replay = GroupChoice(best)


@contextmanager
def routers_in_bf16(model: torch.nn.Module) -> Iterator[None]:
    """Inside the block routers compute their logits in bf16, as engines do that know nothing better."""
    routers = [module for module in model.modules() if isinstance(module, TopKRouter)]

    def narrow(router: Any) -> Any:
        return lambda inputs: linear(inputs.bfloat16(), router.weight.bfloat16()).float()

    try:
        for router in routers:
            router.gating = narrow(router)
        yield
    finally:
        for router in routers:
            del router.gating  # the class's own again
