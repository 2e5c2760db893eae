"""How many parameters a rank holds: of each kind of layer, by who shares them."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_r1.config.model import GroupedAttentionConfig, ModelConfig
from megatron_r1.config.parallel import ParallelConfig


@dataclass(frozen=True, slots=True)
class Parameters:
    """Numbers of parameters."""

    shared: int = 0
    """Divided among the tensor-parallel ranks."""
    whole: int = 0
    """Held whole by each of them."""
    experts: int = 0
    """Of routed experts, divided among the expert-parallel and the expert-tensor-parallel ranks."""

    def __add__(self, other: Parameters) -> Parameters:
        return Parameters(self.shared + other.shared, self.whole + other.whole, self.experts + other.experts)

    def __mul__(self, times: int) -> Parameters:
        return Parameters(self.shared * times, self.whole * times, self.experts * times)

    def dense_of_rank(self, parallel: ParallelConfig) -> int:
        """Those of a rank that are not in routed experts."""
        return self.shared // parallel.tensor + self.whole

    def experts_of_rank(self, parallel: ParallelConfig) -> int:
        """Those of a rank that are in routed experts."""
        return self.experts // (parallel.expert * parallel.expert_tensor)

    @property
    def total(self) -> int:
        return self.shared + self.whole + self.experts


def attention(model: ModelConfig) -> Parameters:
    """Attention with its own norms."""
    width, heads, of = model.hidden_size, model.num_attention_heads, model.attention
    if isinstance(of, GroupedAttentionConfig):
        columns = (heads + 2 * of.num_key_value_heads) * of.head_dim
        shared = width * columns + columns * of.qkv_bias + heads * of.head_dim * width
        return Parameters(shared, 2 * of.head_dim * of.qk_norm)
    query_width = heads * (of.qk_nope_head_dim + of.qk_rope_head_dim)
    rank, latent = of.q_lora_rank, of.kv_lora_rank
    shared = (rank or width) * query_width
    shared += latent * heads * (of.qk_nope_head_dim + of.v_head_dim) + heads * of.v_head_dim * width
    whole = (width * rank + rank if rank else 0) + width * (latent + of.qk_rope_head_dim) + latent
    return Parameters(shared, whole)


def dense_feed_forward(model: ModelConfig) -> Parameters:
    """A dense layer's feed-forward."""
    return Parameters(3 * model.hidden_size * model.ffn_hidden_size)


def sparse_feed_forward(model: ModelConfig) -> Parameters:
    """A sparse layer's feed-forward: router, shared experts, routed experts."""
    expert = 3 * model.hidden_size * model.moe.ffn_hidden_size
    return router(model) + Parameters(model.moe.num_shared_experts * expert, experts=model.moe.num_experts * expert)


def router(model: ModelConfig) -> Parameters:
    """A sparse layer's router, without its balancing bias, which is a buffer."""
    return Parameters(whole=model.hidden_size * model.moe.num_experts)


def layer(model: ModelConfig, sparse: bool) -> Parameters:
    """A transformer layer with its two norms."""
    feed_forward = sparse_feed_forward(model) if sparse else dense_feed_forward(model)
    return attention(model) + feed_forward + Parameters(whole=2 * model.hidden_size)


def mtp_layer(model: ModelConfig) -> Parameters:
    """A multi-token layer: a sparse layer, the projection of what goes in, and three norms."""
    width = model.hidden_size
    return layer(model, sparse=True) + Parameters(2 * width * width, 3 * width)


def embedding(model: ModelConfig) -> Parameters:
    """The input embedding, or the output head."""
    return Parameters(model.vocab_size * model.hidden_size)


def is_sparse(model: ModelConfig, number: int) -> bool:
    """Whether a layer, counted from 0, has experts."""
    return bool(model.moe.num_experts) and number >= model.moe.first_dense_layers


def of_model(model: ModelConfig) -> Parameters:
    """Those of the whole model."""
    total = embedding(model) * (1 if model.tied_embeddings else 2) + Parameters(whole=model.hidden_size)
    for number in range(model.num_layers):
        total += layer(model, is_sparse(model, number))
    return total + mtp_layer(model) * model.mtp.num_layers
