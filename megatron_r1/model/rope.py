"""Rotary positions that megatron-core leaves open."""

from __future__ import annotations

from megatron.core.models.gpt.gpt_model import GPTModel

from megatron_r1.config.model import RopeConfig


def extend_as_llama(model: GPTModel, rope: RopeConfig) -> None:
    """Stretch the rotary frequencies as Llama 3 does.

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
