"""How many parameters one token visits, from a model's shape alone: the 37B of "671B total, 37B activated"."""

from __future__ import annotations

from megatron_r1.config.model import GroupedAttentionConfig, ModelConfig


def activated_parameters(model: ModelConfig, *, include_embedding: bool = False) -> int:
    """Parameters that one token visits in the main model: norms, router and output head included.

    Args:
        include_embedding: count the input embedding too, of which a token only reads one row.
    """
    dense, sparse = _layer_counts(model)
    return (
        model.num_layers * _attention_and_norms(model)
        + dense * _dense_feed_forward(model)
        + sparse * _experts(model, model.moe.top_k)
        + model.hidden_size  # final norm
        + _embedding(model)  # output head
        + (_embedding(model) if include_embedding and not model.tied_embeddings else 0)
    )


def _layer_counts(model: ModelConfig) -> tuple[int, int]:
    dense = model.moe.first_dense_layers if model.moe.num_experts else model.num_layers
    return dense, model.num_layers - dense


def _embedding(model: ModelConfig) -> int:
    return model.vocab_size * model.hidden_size


def _dense_feed_forward(model: ModelConfig) -> int:
    return 3 * model.hidden_size * model.ffn_hidden_size


def _experts(model: ModelConfig, visited: int) -> int:
    """One sparse feed-forward of which `visited` routed experts are counted, without the balancing bias."""
    width, moe = model.hidden_size, model.moe
    return (visited + moe.num_shared_experts) * 3 * width * moe.ffn_hidden_size + width * moe.num_experts


def _attention_and_norms(model: ModelConfig) -> int:
    """One attention with its own norms, and the two norms of its layer."""
    attention, heads, width = model.attention, model.num_attention_heads, model.hidden_size
    if isinstance(attention, GroupedAttentionConfig):
        columns = (heads + 2 * attention.num_key_value_heads) * attention.head_dim
        extra = columns * attention.qkv_bias + 2 * attention.head_dim * attention.qk_norm
        return width * columns + extra + heads * attention.head_dim * width + 2 * width
    query_width = heads * (attention.qk_nope_head_dim + attention.qk_rope_head_dim)
    rank = attention.q_lora_rank
    query = width * rank + rank + rank * query_width if rank else width * query_width
    latent = attention.kv_lora_rank
    key_value = width * (latent + attention.qk_rope_head_dim) + latent
    key_value += latent * heads * (attention.qk_nope_head_dim + attention.v_head_dim)
    return query + key_value + heads * attention.v_head_dim * width + 2 * width
