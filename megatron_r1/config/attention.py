"""The two kinds of attention: DeepSeek's latent one, and the grouped one of dense models."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_r1.config.checks import at_least, one_of, within
from megatron_r1.errors import ConfigError


@dataclass(kw_only=True, slots=True)
class AttentionConfig:
    """Multi-head latent attention (DeepSeek-V2 report, section 2.1)."""

    kind: str = "latent"
    """latent; grouped has keys of its own."""
    q_lora_rank: int = 64
    """Width of the compressed query; 0 projects queries directly."""
    kv_lora_rank: int = 32
    """Width of the compressed key-value latent."""
    qk_nope_head_dim: int = 32
    """Per-head query and key width without position."""
    qk_rope_head_dim: int = 16
    """Per-head width of the decoupled rotary part; its key is shared by all heads."""
    v_head_dim: int = 32
    """Per-head value width."""
    norm_epsilon: float = 1e-6
    """Epsilon of the latents' RMSNorms, which DeepSeek's code fixes whatever the other norms have."""

    def __post_init__(self) -> None:
        one_of(self, "kind", ("latent",))
        at_least(self, 0, "q_lora_rank")
        at_least(self, 1, "kv_lora_rank", "qk_nope_head_dim", "v_head_dim")
        at_least(self, 2, "qk_rope_head_dim")
        within(self, 1e-12, 1e-2, "norm_epsilon")
        if self.qk_rope_head_dim % 2:
            raise ConfigError("qk_rope_head_dim", self.qk_rope_head_dim, "must be even: rotary positions come in pairs")


@dataclass(kw_only=True, slots=True)
class GroupedAttentionConfig:
    """Grouped-query attention as Qwen2, Qwen3 and Llama have it: several query heads share a key-value head."""

    kind: str = "grouped"
    """grouped; latent has keys of its own."""
    num_key_value_heads: int = 2
    """Key-value heads; as many as attention heads is plain multi-head attention."""
    head_dim: int = 32
    """Width of a head."""
    qkv_bias: bool = False
    """Bias on queries, keys and values (Qwen2)."""
    qk_norm: bool = False
    """RMSNorm over each query and key head (Qwen3)."""

    def __post_init__(self) -> None:
        one_of(self, "kind", ("grouped",))
        at_least(self, 1, "num_key_value_heads")
        at_least(self, 2, "head_dim")
        if self.head_dim % 2:
            raise ConfigError("head_dim", self.head_dim, "must be even: rotary positions come in pairs")
        if self.qkv_bias and self.qk_norm:
            raise ConfigError("qk_norm", self.qk_norm, "must be false with qkv_bias: no published model has both")
