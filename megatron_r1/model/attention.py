"""Latent attention as DeepSeek defines it, on either backend."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules


class LatentAttention(MLASelfAttention):
    """Multi-head latent attention whose directly projected query is not normed (DeepSeek-V2 report, section 2.1).

    The latents are. megatron-core 0.19 would norm the query's input a second time where there is no query latent.
    """

    def _resolve_qk_norm_config(self, submodules: Any) -> Any:
        chosen = super()._resolve_qk_norm_config(submodules)
        if self.config.q_lora_rank is None:
            chosen["linear_q_proj"] = submodules.linear_q_proj
        return chosen


def use_latent_attention(block: TransformerBlockSubmodules) -> None:
    """Let every layer of the block, and multi-token layers made after it, attend by `LatentAttention`."""
    for layer in block.layer_specs:
        layer.submodules.self_attention.module = LatentAttention


def set_latent_norm_epsilon(model: torch.nn.Module, epsilon: float) -> None:
    """Give the latents' norms, which are fused into the up-projections, an epsilon of their own.

    megatron-core has one epsilon for all norms, DeepSeek's released code a fixed one for these (1e-6).
    """
    for attention in (module for module in model.modules() if isinstance(module, LatentAttention)):
        for name in ("linear_q_up_proj", "linear_kv_up_proj"):
            if linear := getattr(attention, name, None):
                linear.eps = epsilon
