"""Memory of an inference engine's ranks: weights, and the key-value cache."""

from __future__ import annotations

from megatron_r1.config.model import GroupedAttentionConfig, ModelConfig
from megatron_r1.config.rollout import RolloutConfig
from megatron_r1.memory.parameters import mtp_layer, of_model

WEIGHT_AND_CACHE = 0.88
"""Share of a GPU's memory for weights and cache where none is configured: SGLang's own is between 0.85 and 0.9."""


def engine_weights(model: ModelConfig, rollout: RolloutConfig) -> float:
    """Bytes of weights on one rank of a server; routed experts and all else are divided among its ranks."""
    server = rollout.sglang.server
    held = of_model(model)
    if not rollout.weight_sync.include_mtp:
        layers = mtp_layer(model) * -model.mtp.num_layers
        held += layers
    linear = 1.0 if server.quantization == "fp8" else _element(model)
    # Attention is divided among the ranks of a group only.
    within = server.tensor_parallel // server.data_parallel_attention
    return linear * (held.shared / within + held.experts / server.tensor_parallel) + _element(model) * held.whole


def cache_bytes_per_token(model: ModelConfig, rollout: RolloutConfig) -> float:
    """Bytes of the cache per token on one rank: the latents of latent attention are on every rank of a group."""
    server, attention = rollout.sglang.server, model.attention
    number = _element(model) if server.kv_cache_dtype == "auto" else 1
    layers = model.num_layers + (model.mtp.num_layers if server.speculative.method == "mtp" else 0)
    if isinstance(attention, GroupedAttentionConfig):
        within = server.tensor_parallel // server.data_parallel_attention
        heads = max(1, attention.num_key_value_heads / within)
        return layers * number * 2 * heads * attention.head_dim
    return layers * number * (attention.kv_lora_rank + attention.qk_rope_head_dim)


def _element(model: ModelConfig) -> int:
    return 2 if model.dtype == "bf16" else 4
