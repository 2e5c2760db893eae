"""The stored list of Transformer Engine's parameters (tests/model/te_layout.json), for the shapes that tests build.

An entry gives a parameter's whole shape, the dimension that tensor-parallel ranks share (`split`; absent where each
rank holds all of it) and of how many parts, each shared out on its own, that dimension is made (gate and up: 2).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_r1.config.load import load
from megatron_r1.config.model import AttentionConfig, GroupedAttentionConfig, ModelConfig, MoeConfig, MtpConfig

STORED = json.loads((Path(__file__).parents[1] / "model" / "te_layout.json").read_text())


@dataclass(frozen=True)
class Entry:
    shape: tuple[int, ...]
    split: int | None = None
    parts: int = 1
    expert: int | None = None

    def local_shape(self, ranks: int) -> tuple[int, ...]:
        return tuple(size // ranks if axis == self.split else size for axis, size in enumerate(self.shape))

    def shard(self, whole: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
        if self.split is None:
            return whole
        parts = whole.chunk(self.parts, self.split)
        return torch.cat([part.chunk(ranks, self.split)[rank] for part in parts], self.split)


def te_layout(shape: str) -> dict[str, Entry]:
    """Every parameter of the stored shape by name."""
    stored = STORED[shape]
    names = dict(stored["once"])
    for kind in ("dense", "sparse"):
        for layer in stored[f"{kind}_layers"]:
            names |= {f"{layer}.{name}": entry for name, entry in stored["every_layer"].items()}
            names |= {f"{layer}.{name}": entry for name, entry in stored[f"{kind}_layer"].items()}
    layout = {}
    for name, entry in names.items():
        for expert in range(stored["experts"]) if "{expert}" in name else [None]:
            entry = {**entry, "shape": tuple(entry["shape"]), "expert": expert}
            layout[name.format(expert=expert)] = Entry(**entry)
    return layout


def model_of(shape: str) -> ModelConfig:
    """The model that the stored shape, or the preset, describes; weights large enough for every part to matter."""
    if shape == "tiny":
        return ModelConfig(init_std=0.08)
    if shape == "tiny_dense":
        dense = load("pretrain", ["model=tiny_dense"]).model
        dense.init_std = 0.08
        return dense
    if shape.startswith("grouped"):
        bias, sparse = shape == "grouped_bias", shape == "grouped_experts"
        return ModelConfig(
            num_layers=2,
            hidden_size=40,
            num_attention_heads=6,
            ffn_hidden_size=52,
            vocab_size=68,
            max_sequence_length=64,
            init_std=0.08,
            tied_embeddings=shape == "grouped_norm",
            attention=GroupedAttentionConfig(num_key_value_heads=2, head_dim=10, qkv_bias=bias, qk_norm=not bias),
            moe=_qwen3_experts() if sparse else MoeConfig.none(),
            mtp=MtpConfig(num_layers=0),
        )
    return ModelConfig(
        num_layers=3,
        hidden_size=40,
        num_attention_heads=6,
        ffn_hidden_size=52,
        vocab_size=68,
        max_sequence_length=64,
        init_std=0.08,
        attention=AttentionConfig(
            q_lora_rank=0, kv_lora_rank=14, qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=20
        ),
        moe=MoeConfig(num_experts=4, top_k=2, ffn_hidden_size=24, num_shared_experts=2),
    )


def _qwen3_experts() -> MoeConfig:
    return MoeConfig(
        num_experts=4,
        top_k=2,
        ffn_hidden_size=24,
        num_shared_experts=0,
        first_dense_layers=0,
        num_groups=1,
        score_function="softmax_topk",
        scaling_factor=1.0,
    )
