"""Seeded draws of small shapes of every family, none of whose sizes is like another by design."""

from __future__ import annotations

import random
from typing import Any

from megatron_r1.config.model import (
    AttentionConfig,
    GroupedAttentionConfig,
    ModelConfig,
    MoeConfig,
    MtpConfig,
    RopeConfig,
)

MSCALES = ((1.0, 1.0), (0.707, 0.707), (1.0, 0.0))
"""V3's temperatures, V2-Lite's, and the one that scales rotary parts alone."""
GROUPED = ("qwen2", "qwen3", "qwen3_moe", "llama")


def sparse_shape(seed: int) -> ModelConfig:
    """A DeepSeek shape: every second seed projects queries directly, every third has V2's router."""
    draw = random.Random(f"sparse/{seed}")
    score_function = "softmax" if seed % 3 == 2 else "sigmoid"
    groups = (1, 2, 4)[seed // 3 % 3]
    size = draw.choice((2, 3, 4))
    # V2's groups are never all open: how they are ranked is what its router differs in.
    open_groups = draw.randint(1, max(1, groups - 1) if score_function == "softmax" else groups)
    most = min(4, open_groups * size)
    moe = MoeConfig(
        num_experts=groups * size,
        top_k=draw.randint(2, most),
        ffn_hidden_size=draw.choice((12, 20)),
        num_shared_experts=draw.choice((1, 2)),
        first_dense_layers=seed // 3 % 4,
        num_groups=groups,
        group_top_k=open_groups,
        score_function=score_function,
        scaling_factor=draw.choice((1.0, 2.446, 2.5)),
        sequence_loss_coefficient=0.0,
    )
    attention = AttentionConfig(
        q_lora_rank=(0, 14, 20)[seed % 2 * draw.randint(1, 2)],
        kv_lora_rank=draw.choice((12, 18)),
        qk_nope_head_dim=draw.choice((10, 14)),
        qk_rope_head_dim=draw.choice((4, 8)),
        v_head_dim=draw.choice((6, 16, 22)),
    )
    mscale, all_dim = MSCALES[seed // 9 % 3]
    rope = RopeConfig(
        base=draw.choice((1e4, 5e4)),
        factor=(1.0, 4.0, 40.0)[draw.randrange(3)],
        original_max_position=draw.choice((8, 16)),
        mscale=mscale,
        mscale_all_dim=all_dim,
    )
    mtp = MtpConfig(num_layers=0 if score_function == "softmax" else draw.randint(0, 1))
    # transformers' DeepSeek-V2 wants a width that its heads divide.
    return _model(draw, moe.first_dense_layers + draw.choice((1, 2)), 24, (2, 3), attention, rope, moe, mtp)


def grouped_shape(kind: str, seed: int) -> ModelConfig:
    """A shape of one of the families with grouped attention; every second one ties its embeddings."""
    draw = random.Random(f"{kind}/{seed}")
    attention = GroupedAttentionConfig(
        num_key_value_heads=(1, 2, 4)[seed % 3],
        head_dim=draw.choice((6, 8, 10)),
        qkv_bias=kind == "qwen2",
        qk_norm=kind.startswith("qwen3"),
    )
    rope = RopeConfig(base=draw.choice((1e4, 5e5)))
    if kind == "llama" and seed % 2 == 0:
        factor, original = draw.choice((8.0, 32.0)), draw.choice((16, 64))
        rope = RopeConfig(base=1e4, scaling="llama3", factor=factor, original_max_position=original, beta_fast=4.0)
    settings: dict[str, Any] = {"tied_embeddings": seed % 2 == 1}
    moe = _qwen3_experts(draw, seed) if kind == "qwen3_moe" else MoeConfig.none()
    return _model(draw, draw.choice((2, 3)), 24, (4, 8), attention, rope, moe, MtpConfig(num_layers=0), **settings)


def _qwen3_experts(draw: random.Random, seed: int) -> MoeConfig:
    """Normalised over the chosen experts, never all, as released; every fifth not, which transformers can say too."""
    return MoeConfig(
        num_experts=draw.choice((5, 6, 9)),
        top_k=draw.choice((2, 3, 4)),
        ffn_hidden_size=draw.choice((12, 20)),
        num_shared_experts=0,
        first_dense_layers=0,
        num_groups=1,
        score_function="softmax" if seed % 5 == 4 else "softmax_topk",
        scaling_factor=1.0,
        sequence_loss_coefficient=0.0,
    )


def _model(
    draw: random.Random,
    layers: int,
    hidden: int,
    heads: tuple[int, ...],
    attention: AttentionConfig | GroupedAttentionConfig,
    rope: RopeConfig,
    moe: MoeConfig,
    mtp: MtpConfig,
    **settings: Any,
) -> ModelConfig:
    return ModelConfig(
        num_layers=layers,
        hidden_size=hidden,
        num_attention_heads=draw.choice(heads),
        ffn_hidden_size=draw.choice((36, 44)),
        vocab_size=draw.choice((67, 96)),
        max_sequence_length=64,
        norm_epsilon=draw.choice((1e-6, 1e-5)),
        init_std=0.12,
        attention=attention,
        rope=rope,
        moe=moe,
        mtp=mtp,
        **settings,
    )
