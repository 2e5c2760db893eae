"""Latent attention as DeepSeek defines it, on either backend."""

from __future__ import annotations

from typing import Any

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
