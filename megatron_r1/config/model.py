"""The shape of a DeepSeek-V3-class model (DeepSeek-V3 report, section 4.2)."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_r1.config.checks import at_least, one_of, within
from megatron_r1.errors import ConfigError


@dataclass(kw_only=True, slots=True)
class AttentionConfig:
    """Multi-head latent attention."""

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

    def __post_init__(self) -> None:
        at_least(self, 0, "q_lora_rank")
        at_least(self, 1, "kv_lora_rank", "qk_nope_head_dim", "v_head_dim")
        at_least(self, 2, "qk_rope_head_dim")
        if self.qk_rope_head_dim % 2:
            raise ConfigError("qk_rope_head_dim", self.qk_rope_head_dim, "must be even: rotary positions come in pairs")


@dataclass(kw_only=True, slots=True)
class RopeConfig:
    """Rotary positions; a factor above 1 turns on YaRN."""

    base: float = 10000.0
    """Base of the rotary frequencies."""
    factor: float = 1.0
    """YaRN context extension factor; 1 is plain rotary positions."""
    original_max_position: int = 4096
    """Context length before extension, in tokens."""
    beta_fast: float = 32.0
    """YaRN upper rotation bound."""
    beta_slow: float = 1.0
    """YaRN lower rotation bound."""
    mscale: float = 1.0
    """YaRN temperature of the rotary part."""
    mscale_all_dim: float = 1.0
    """YaRN temperature of the whole attention logit."""

    def __post_init__(self) -> None:
        at_least(self, 1, "base", "factor", "original_max_position", "beta_slow")
        at_least(self, 0, "mscale", "mscale_all_dim")
        if self.beta_fast <= self.beta_slow:
            raise ConfigError("beta_fast", self.beta_fast, f"must be above beta_slow={self.beta_slow}")


@dataclass(kw_only=True, slots=True)
class MixtureConfig:
    """The mixture-of-experts layers and their router."""

    num_experts: int = 8
    """Routed experts per layer."""
    top_k: int = 2
    """Experts that each token visits."""
    ffn_hidden_size: int = 64
    """Hidden width of one expert."""
    num_shared_experts: int = 1
    """Experts that every token visits."""
    first_dense_layers: int = 1
    """Leading layers with a dense feed-forward instead of experts."""
    num_groups: int = 2
    """Groups (nodes) that the experts are divided into."""
    group_top_k: int = 1
    """Groups that a token's experts may come from."""
    score_function: str = "sigmoid"
    """Router score: sigmoid (V3) or softmax (V2)."""
    scaling_factor: float = 2.5
    """Factor on the normalised gate values."""
    bias_update_rate: float = 1e-3
    """Step of the auxiliary-loss-free balancing bias per optimizer step; 0 freezes it."""
    sequence_loss_coefficient: float = 1e-4
    """Weight of the sequence-wise balance loss; 0 turns it off."""

    def __post_init__(self) -> None:
        at_least(self, 1, "num_experts", "top_k", "ffn_hidden_size", "num_groups", "group_top_k")
        at_least(self, 0, "num_shared_experts", "first_dense_layers", "bias_update_rate", "sequence_loss_coefficient")
        within(self, 1e-3, 1e3, "scaling_factor")
        one_of(self, "score_function", ("sigmoid", "softmax"))
        if self.num_experts % self.num_groups:
            raise ConfigError("num_groups", self.num_groups, f"must divide num_experts={self.num_experts}")
        if self.group_top_k > self.num_groups:
            raise ConfigError("group_top_k", self.group_top_k, f"must be at most num_groups={self.num_groups}")
        reachable = self.num_experts // self.num_groups * self.group_top_k
        if self.top_k > reachable:
            raise ConfigError("top_k", self.top_k, f"must be at most {reachable}, the experts in group_top_k groups")
        if self.top_k % self.group_top_k:
            raise ConfigError("top_k", self.top_k, f"must be a multiple of group_top_k={self.group_top_k}")


@dataclass(kw_only=True, slots=True)
class MultiTokenConfig:
    """Multi-token prediction (DeepSeek-V3 report, section 2.2)."""

    num_layers: int = 1
    """Extra prediction depths; 0 turns it off."""
    loss_coefficient: float = 0.3
    """Weight of the extra predictions' loss."""

    def __post_init__(self) -> None:
        within(self, 0, 4, "num_layers")
        at_least(self, 0, "loss_coefficient")


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """A transformer with latent attention and sparse experts."""

    num_layers: int = 4
    """Transformer layers, without the multi-token ones."""
    hidden_size: int = 128
    """Model width."""
    num_attention_heads: int = 4
    """Attention heads."""
    ffn_hidden_size: int = 256
    """Hidden width of the dense layers' feed-forward."""
    vocab_size: int = 512
    """Rows of the embedding; must hold the tokenizer's vocabulary."""
    max_sequence_length: int = 256
    """Longest sequence, in tokens."""
    norm_epsilon: float = 1e-6
    """Epsilon of every RMSNorm."""
    init_std: float = 0.045
    """Standard deviation of all initial weights; DeepSeek-V3's is 0.006, at a width of 7168."""
    precision: str = "fp32"
    """Parameter and activation type: fp32 or bf16."""
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    """Multi-head latent attention."""
    rope: RopeConfig = field(default_factory=RopeConfig)
    """Rotary positions."""
    moe: MixtureConfig = field(default_factory=MixtureConfig)
    """Experts and their router."""
    mtp: MultiTokenConfig = field(default_factory=MultiTokenConfig)
    """Multi-token prediction."""

    def __post_init__(self) -> None:
        at_least(self, 1, "num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size", "vocab_size")
        at_least(self, 2, "max_sequence_length")
        within(self, 1e-12, 1e-2, "norm_epsilon")
        within(self, 1e-5, 1.0, "init_std")
        one_of(self, "precision", ("fp32", "bf16"))
        if self.moe.first_dense_layers >= self.num_layers:
            raise ConfigError(
                "moe.first_dense_layers", self.moe.first_dense_layers, f"must be below num_layers={self.num_layers}"
            )
