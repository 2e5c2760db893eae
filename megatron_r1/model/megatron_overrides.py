"""Corrections of megatron-core 0.19 where it computes something else than the released models, or slowly.

The file to open when megatron-core is upgraded:

    what                        megatron-core                           here
    latent attention's query    norms the input twice where there is    `use_latent_attention`
                                no query latent (DeepSeek-V2-Lite)
    norms of the latents        the epsilon of all norms                `set_latent_norm_epsilon`
    group-limited routing       ranks groups by top_k / group_top_k     `use_deepseek_group_topk`
                                of their experts, whatever the release
    Llama 3's rotary positions  passes on the factor alone              `use_llama3_rope_scaling`
    multi-token loss            holds all logits at once; weighs        `mtp_loss.use_chunked_mtp_loss`
                                context-parallel ranks alike
    rotary positions of packed  turns one sequence after another        `rotate_packed_at_once`
    sequences
    routers' logits in bf16     has no such choice; `diagnose` asks     `routers_in_bf16`
                                whether an engine computes them so

Shapes: T tokens, E experts, G groups, K chosen experts, L positions, H heads, D width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor
from torch.nn.functional import linear

from megatron_r1.config.model import MoeConfig, RopeConfig

_rotate_one_by_one = rope_utils._apply_rotary_pos_emb_thd


class LatentAttention(MLASelfAttention):  # type: ignore[misc]
    """Multi-head latent attention whose directly projected query is not normed (DeepSeek-V2 report, section 2.1).

    The latents are. megatron-core would norm the query's input a second time where there is no query latent.
    """

    def _resolve_qk_norm_config(self, submodules: Any) -> Any:
        chosen = super()._resolve_qk_norm_config(submodules)
        if self.config.q_lora_rank is None:
            chosen["linear_q_proj"] = submodules.linear_q_proj
        return chosen


def use_latent_attention(layers: Iterable[ModuleSpec], attention: type[LatentAttention] = LatentAttention) -> None:
    """Let these layers, and multi-token layers made after them, attend by a `LatentAttention`."""
    for layer in layers:
        layer.submodules.self_attention.module = attention


def set_latent_norm_epsilon(model: torch.nn.Module, epsilon: float) -> None:
    """Give the latents' norms, which are fused into the up-projections, an epsilon of their own.

    megatron-core has one epsilon for all norms, DeepSeek's released code a fixed one for these (1e-6).
    """
    for attention in (module for module in model.modules() if isinstance(module, LatentAttention)):
        for name in ("linear_q_up_proj", "linear_kv_up_proj"):
            if up_projection := getattr(attention, name, None):
                up_projection.eps = epsilon


class GroupTopK:
    """Chooses groups by the sum of each one's best scores, then experts among the chosen groups.

    Stands where megatron-core asks a routing replay which experts to take.
    """

    layer_number: int | None = None

    def __init__(self, best: int):
        """
        Args:
            best: how many of a group's experts are summed to rank the group.
        """
        self._best = best

    def get_replay_topk(
        self, scores_TE: Tensor, topk: int, num_groups: int, group_topk: int, default: Any = None
    ) -> tuple[Tensor, Tensor]:
        """Scores and indices [T, K] of the chosen experts."""
        scores_TGE = torch.unflatten(scores_TE, 1, (num_groups, -1))
        groups_TG = scores_TGE.topk(self._best, dim=-1).values.sum(-1)
        chosen_TG = torch.zeros_like(groups_TG, dtype=torch.bool)
        chosen_TG.scatter_(1, groups_TG.topk(group_topk, dim=-1, sorted=False).indices, True)
        open_TE = scores_TGE.masked_fill(~chosen_TG.unsqueeze(-1), float("-inf")).flatten(1)
        values_TK, indices_TK = open_TE.topk(topk, dim=-1)
        return values_TK, indices_TK


def use_deepseek_group_topk(model: torch.nn.Module, moe: MoeConfig) -> None:
    """Let the routers rank groups as the releases do: V3 by its best two experts, V2 by its best one.

    megatron-core takes the best top_k / group_top_k, which is the same for V3's own 8 experts of 4 groups, but not for
    V2's 6 of 3. Where all groups are open, or the two rules agree, megatron-core's own choice stays.
    """
    best = 2 if moe.score_function == "sigmoid" else 1
    if moe.group_top_k == moe.num_groups or moe.top_k // moe.group_top_k == best:
        return
    for router in (module for module in model.modules() if isinstance(module, TopKRouter)):
        router.router_replay = GroupTopK(best)


def use_llama3_rope_scaling(model: GPTModel, rope: RopeConfig) -> None:
    """Scale the rotary frequencies as Llama 3 does.

    megatron-core computes it, but `GPTModel` passes on the factor alone and fixes the other three numbers.
    """
    rotary = model.rotary_pos_emb
    rotary.inv_freq = rotary._apply_scaling(
        rotary.inv_freq,
        factor=rope.factor,
        low_freq_factor=rope.beta_slow,
        high_freq_factor=rope.beta_fast,
        original_max_position_embeddings=rope.original_max_position,
    )


def rotate_packed_at_once() -> None:
    """Turn all tokens of packed sequences in one go, where no fused kernel does.

    megatron-core does it for sequence after sequence. Calling it again changes nothing.
    """
    rope_utils._apply_rotary_pos_emb_thd = _rotate_packed


def _rotate_packed(
    x_THD: Tensor, bounds: Tensor, freqs_L11D: Tensor, *args: Any, cp_group: Any = None, **kwargs: Any
) -> Tensor:
    of_every_token = len(freqs_L11D) == len(x_THD)
    if of_every_token or cp_group.size() > 1:
        rotated: Tensor = _rotate_one_by_one(x_THD, bounds, freqs_L11D, *args, cp_group=cp_group, **kwargs)
        return rotated
    starts_T = bounds[:-1].repeat_interleave(bounds.diff())
    positions_T = torch.arange(len(x_THD), device=x_THD.device) - starts_T
    turned: Tensor = rope_utils._apply_rotary_pos_emb_bshd(x_THD[:, None], freqs_L11D[positions_T], *args, **kwargs)
    return turned.squeeze(1)


@contextmanager
def routers_in_bf16(model: torch.nn.Module) -> Iterator[None]:
    """Inside the block routers compute their logits in bf16, as some engines do."""
    routers = [module for module in model.modules() if isinstance(module, TopKRouter)]

    def in_bf16(router: Any) -> Callable[[Tensor], Tensor]:
        return lambda inputs: linear(inputs.bfloat16(), router.weight.bfloat16()).float()

    try:
        for router in routers:
            router.gating = in_bf16(router)
        yield
    finally:
        for router in routers:
            del router.gating  # the class's own again
