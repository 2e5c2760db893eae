"""Parameter counts from a model's shape alone, as published: "671B total, 37B activated".

A count includes the routers' balancing bias where it speaks of what is stored, and leaves it out where it speaks of
what a token is multiplied with.
"""

from __future__ import annotations

from megatron_r1.config.attention import GroupedAttentionConfig
from megatron_r1.config.model import ModelConfig


def total_parameters(model: ModelConfig) -> int:
    """All weights of the main model, balancing biases included; no multi-token prediction."""
    dense, sparse = _layer_counts(model)
    bias = model.moe.num_experts if model.moe.score_function == "sigmoid" else 0
    return (
        _embedding(model) * (1 if model.tied_embeddings else 2)
        + model.num_layers * _attention_and_norms(model)
        + dense * _dense_feed_forward(model)
        + sparse * (_experts(model, model.moe.num_experts) + bias)
        + model.hidden_size  # final norm
    )


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


def multi_token_parameters(model: ModelConfig) -> int:
    """Weights that only multi-token prediction has; it shares embedding and head with the main model."""
    bias = model.moe.num_experts
    return model.mtp.num_layers * (_multi_token_joint(model) + _experts(model, model.moe.num_experts) + bias)


def activated_multi_token_parameters(model: ModelConfig) -> int:
    """Parameters that one token visits in multi-token prediction, the head that it visits once more per depth included.

    A training step multiplies with them on top of the main model's.
    """
    own = _multi_token_joint(model) + _experts(model, model.moe.top_k)
    return model.mtp.num_layers * (own + _embedding(model))


def released_parameters(model: ModelConfig) -> int:
    """Numbers that a Hugging Face folder holds: each multi-token layer repeats embedding and head."""
    return total_parameters(model) + multi_token_parameters(model) + 2 * model.mtp.num_layers * _embedding(model)


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


def _multi_token_joint(model: ModelConfig) -> int:
    """One depth without its feed-forward: three norms, the joining projection, attention with the layer's two norms."""
    width = model.hidden_size
    return 3 * width + 2 * width * width + _attention_and_norms(model)


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
