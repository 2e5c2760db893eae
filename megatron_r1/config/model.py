"""The shape of a model: DeepSeek's latent attention with experts, or grouped attention with or without experts."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_r1.config.checks import at_least, one_of, within
from megatron_r1.errors import ConfigError

DTYPE_NAMES = {"fp32": "float32", "bf16": "bfloat16"}
"""`model.dtype` -> its name in torch, in config.json and in SGLang's arguments."""


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
    """Grouped-query attention as Qwen and Llama have it: several query heads share a key-value head."""

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


@dataclass(kw_only=True, slots=True)
class RopeConfig:
    """Rotary positions; a factor above 1 extends them to longer contexts."""

    base: float = 10000.0
    """Base of the rotary frequencies."""
    scaling: str = "yarn"
    """How a factor above 1 extends: yarn (DeepSeek) or llama3."""
    factor: float = 1.0
    """Context extension factor; 1 is plain rotary positions and leaves the softmax temperature alone."""
    original_max_position: int = 4096
    """Context length before extension, in tokens."""
    beta_fast: float = 32.0
    """Frequencies that turn more often than this in the original context stay (llama3: high_freq_factor)."""
    beta_slow: float = 1.0
    """Frequencies that turn less often than this are divided by the factor (llama3: low_freq_factor)."""
    mscale: float = 1.0
    """YaRN temperature of the rotary part."""
    mscale_all_dim: float = 1.0
    """YaRN temperature of the whole attention logit."""

    def __post_init__(self) -> None:
        one_of(self, "scaling", ("yarn", "llama3"))
        at_least(self, 1, "base", "factor", "original_max_position", "beta_slow")
        at_least(self, 0, "mscale", "mscale_all_dim")
        if self.beta_fast <= self.beta_slow:
            raise ConfigError("beta_fast", self.beta_fast, f"must be above beta_slow={self.beta_slow}")


_SIZES = ("top_k", "ffn_hidden_size", "num_shared_experts", "first_dense_layers", "num_groups", "group_top_k")
"""Sizes of a mixture that a dense model has none of."""


@dataclass(kw_only=True, slots=True)
class MoeConfig:
    """The mixture-of-experts layers and their router."""

    num_experts: int = 8
    """Routed experts per layer; 0 makes every layer dense, and then the other sizes must be 0 too."""
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
    """sigmoid (V3: balanced by a bias, gates normalised over the chosen), softmax (V2: neither) or softmax_topk (Qwen3:
    gates normalised over the chosen, no bias)."""
    scaling_factor: float = 2.5
    """Factor on the gate values."""
    bias_update_rate: float = 1e-3
    """Step of the auxiliary-loss-free balancing bias per optimizer step; 0 freezes it."""
    sequence_loss_coefficient: float = 1e-4
    """Weight of the sequence-wise balance loss; 0 turns it off."""

    @classmethod
    def none(cls) -> MoeConfig:
        """No experts: every layer is dense."""
        return cls(num_experts=0, **dict.fromkeys(_SIZES, 0))  # type: ignore[arg-type]

    def __post_init__(self) -> None:
        if self.num_experts == 0:
            for name in _SIZES:
                if value := getattr(self, name):
                    raise ConfigError(name, value, "must be 0: with num_experts=0 there are no experts")
            return
        at_least(self, 1, "num_experts", "top_k", "ffn_hidden_size", "num_groups", "group_top_k")
        at_least(self, 0, "num_shared_experts", "first_dense_layers", "bias_update_rate", "sequence_loss_coefficient")
        within(self, 1e-3, 1e3, "scaling_factor")
        one_of(self, "score_function", ("sigmoid", "softmax", "softmax_topk"))
        if self.score_function == "softmax_topk" and self.top_k < 2:
            raise ConfigError(
                "top_k", self.top_k, "must be at least 2 with softmax_topk: a single gate would always be 1"
            )
        if self.num_experts % self.num_groups:
            raise ConfigError("num_groups", self.num_groups, f"must divide num_experts={self.num_experts}")
        if self.group_top_k > self.num_groups:
            raise ConfigError("group_top_k", self.group_top_k, f"must be at most num_groups={self.num_groups}")
        reachable = self.num_experts // self.num_groups * self.group_top_k
        if self.top_k > reachable:
            raise ConfigError("top_k", self.top_k, f"must be at most {reachable}, the experts in group_top_k groups")


@dataclass(kw_only=True, slots=True)
class MtpConfig:
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
    """A transformer: latent attention with sparse experts, or grouped attention with sparse experts or dense layers."""

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
    """Epsilon of every RMSNorm but those of the latents."""
    init_std: float = 0.045
    """Standard deviation of all initial weights; DeepSeek-V3's is 0.006, at a width of 7168."""
    dtype: str = "fp32"
    """Parameter and activation type: fp32 or bf16. On CUDA Transformer Engine multiplies fp32 in TF32: about 1e-3."""
    tied_embeddings: bool = False
    """Whether the output head is the embedding."""
    attention: AttentionConfig | GroupedAttentionConfig = field(default_factory=AttentionConfig)
    """Latent or grouped attention, by its key `kind`."""
    rope: RopeConfig = field(default_factory=RopeConfig)
    """Rotary positions."""
    moe: MoeConfig = field(default_factory=MoeConfig)
    """Experts and their router."""
    mtp: MtpConfig = field(default_factory=MtpConfig)
    """Multi-token prediction."""

    def __post_init__(self) -> None:
        at_least(self, 1, "num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size", "vocab_size")
        at_least(self, 2, "max_sequence_length")
        within(self, 1e-12, 1e-2, "norm_epsilon")
        within(self, 1e-5, 1.0, "init_std")
        one_of(self, "dtype", tuple(DTYPE_NAMES))
        if isinstance(self.attention, GroupedAttentionConfig):
            self._check_grouped(self.attention)
            if self.moe.num_experts:
                self._check_qwen3_moe(self.attention)
        else:
            self._check_latent()

    def _check_grouped(self, attention: GroupedAttentionConfig) -> None:
        """No published model of this kind predicts several tokens."""
        if self.mtp.num_layers:
            raise ConfigError("mtp.num_layers", self.mtp.num_layers, "must be 0 with grouped attention")
        if self.num_attention_heads % attention.num_key_value_heads:
            allowed = f"must divide num_attention_heads={self.num_attention_heads}"
            raise ConfigError("attention.num_key_value_heads", attention.num_key_value_heads, allowed)
        if self.rope.scaling == "yarn" and self.rope.factor > 1:
            raise ConfigError("rope.scaling", "yarn", "must be llama3 with grouped attention")

    def _check_qwen3_moe(self, attention: GroupedAttentionConfig) -> None:
        """Of models with grouped attention and experts, Qwen3's are the only ones that have a family here."""
        if not attention.qk_norm:
            raise ConfigError(
                "attention.qk_norm", False, "must be true with grouped attention and experts, as in Qwen3"
            )
        if self.moe.score_function == "sigmoid":
            allowed = "must be softmax_topk or softmax with grouped attention, as in Qwen3"
            raise ConfigError("moe.score_function", "sigmoid", allowed)
        plain = {"num_shared_experts": 0, "first_dense_layers": 0, "num_groups": 1, "scaling_factor": 1}
        for name, value in plain.items():
            if (found := getattr(self.moe, name)) != value:
                raise ConfigError(f"moe.{name}", found, f"must be {value} with grouped attention, as in Qwen3")

    def _check_latent(self) -> None:
        """DeepSeek's models."""
        moe = self.moe
        if moe.score_function == "softmax_topk":
            allowed = "must be sigmoid or softmax with latent attention"
            raise ConfigError("moe.score_function", "softmax_topk", allowed)
        if not moe.num_experts:
            raise ConfigError("moe.num_experts", 0, "must be at least 1 with latent attention")
        if moe.first_dense_layers >= self.num_layers:
            allowed = f"must be below num_layers={self.num_layers}"
            raise ConfigError("moe.first_dense_layers", moe.first_dense_layers, allowed)
        if moe.score_function == "softmax" and self.mtp.num_layers:
            raise ConfigError("mtp.num_layers", self.mtp.num_layers, "must be 0 with softmax scores, as in V2")
        if self.tied_embeddings:
            raise ConfigError("tied_embeddings", True, "must be false with latent attention")
        if self.rope.scaling == "llama3" and self.rope.factor > 1:
            raise ConfigError("rope.scaling", "llama3", "must be yarn with latent attention")
