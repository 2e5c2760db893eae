"""Latent attention's queries, keys and values in one node of autograd, where Transformer Engine has a kernel."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.utils import get_pg_size
from torch import Tensor

from megatron_r1.model.fused import LatentProjections, rotated_heads
from megatron_r1.model.megatron_overrides import LatentAttention


class FusedLatentAttention(LatentAttention):
    """In training on whole sequences; packed ones, sampling and recomputation go megatron-core's way."""

    def get_query_key_value_tensors(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        position_ids: Tensor | None = None,
        packed_seq_params: Any = None,
        inference_context: Any = None,
        **more: Any,
    ) -> tuple[Tensor, ...]:
        if packed_seq_params is not None or inference_context is not None or self.recompute_up_proj:
            found: tuple[Tensor, ...] = super().get_query_key_value_tensors(
                hidden_states, key_value_states, position_ids, packed_seq_params, inference_context, **more
            )
            return found
        query_latent, combined = self._qkv_down_projection(hidden_states)
        widths = [self.config.kv_lora_rank, self.config.qk_pos_emb_head_dim]
        latent, rotary_key_LBR = combined.split(widths, dim=-1)
        if self.config.sequence_parallel and get_pg_size(self.tp_group) > 1:
            rotary_key_LBR = gather_from_sequence_parallel_region(rotary_key_LBR, group=self.tp_group)
        project_query = self.linear_q_proj if self.config.q_lora_rank is None else self.linear_q_up_proj
        query, key_value = project_query(query_latent)[0], self.linear_kv_up_proj(latent)[0]
        heads = self.num_attention_heads_per_partition
        projections = LatentProjections(
            query.unflatten(-1, (heads, -1)), key_value.unflatten(-1, (heads, -1)), rotary_key_LBR
        )
        turn = self._turn(hidden_states, query)
        return *rotated_heads(projections, *turn), query_latent, latent

    def _turn(self, hidden_states: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine of this rank's positions' angles, [L, R / 2]."""
        rotary = self.rotary_pos_emb
        length = rotary.get_rotary_seq_len(None, None, hidden_states, self.config, None)
        angles, scale = rotary(length) if self.config.rope_type == "yarn" else (rotary(length), 1.0)
        angles_LR = angles[: query.shape[0], 0, 0, : angles.shape[-1] // 2]
        cos_LR, sin_LR = torch.cos(angles_LR) * scale, torch.sin(angles_LR) * scale
        return cos_LR.to(query.dtype), sin_LR.to(query.dtype)
