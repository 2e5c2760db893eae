"""Arithmetic of the model: parameters and floating-point operations, in DeepSeek's accounting.

FLOPs per token = 6 N + 3 L 2 S H (D_qk + D_v) (a half where attention is causal), N being the parameters that a token
visits without the input embedding and without multi-token prediction. Model FLOPs utilisation divides by the peak of
the parameter type ("Insights into DeepSeek-V3", table 4, counts it this way).
"""

from __future__ import annotations

import time

import torch

from megatron_r1.config.model import ModelConfig

# Dense bf16 peaks in FLOP/s, from the vendor's datasheets, by a part of the device's name.
_PEAKS = {"H100": 989.5e12, "H800": 989.5e12, "H200": 989.5e12, "A100": 312e12}


def activated_parameters(model: ModelConfig) -> int:
    """Parameters that one token visits: norms and router included; no input embedding, no multi-token prediction."""
    dense, sparse = model.moe.first_dense_layers, model.num_layers - model.moe.first_dense_layers
    width, moe = model.hidden_size, model.moe
    norms = 2 * width
    experts = (moe.top_k + moe.num_shared_experts) * 3 * width * moe.ffn_hidden_size
    router = width * moe.num_experts
    per_layer = _attention_parameters(model) + norms
    return (
        model.num_layers * per_layer
        + dense * 3 * width * model.ffn_hidden_size
        + sparse * (experts + router)
        + width  # final norm
        + model.vocab_size * width  # output head
    )


def _attention_parameters(model: ModelConfig) -> int:
    """Weights of one latent attention, its two latent norms included."""
    attention, heads, width = model.attention, model.num_attention_heads, model.hidden_size
    query_width = heads * (attention.qk_nope_head_dim + attention.qk_rope_head_dim)
    rank = attention.q_lora_rank
    query = width * rank + rank + rank * query_width if rank else width * query_width
    latent = attention.kv_lora_rank
    key_value = width * (latent + attention.qk_rope_head_dim) + latent
    key_value += latent * heads * (attention.qk_nope_head_dim + attention.v_head_dim)
    return query + key_value + heads * attention.v_head_dim * width


def flops_per_token(model: ModelConfig, sequence_length: int, *, causal: bool = True) -> float:
    """Forward and backward FLOPs of one token in a sequence of `sequence_length`."""
    attention = model.attention
    widths = attention.qk_nope_head_dim + attention.qk_rope_head_dim + attention.v_head_dim
    scores = 3 * model.num_layers * 2 * sequence_length * model.num_attention_heads * widths
    return 6 * activated_parameters(model) + scores * (0.5 if causal else 1.0)


def peak_flops(device: str) -> float:
    """Peak FLOP/s of one rank's device: the datasheet's for known GPUs, else of a measured matrix product.

    On the CPU it is the best of several 1024-cube fp32 products with this process's threads.
    """
    if device.startswith("cuda"):
        name = torch.cuda.get_device_name()
        known = [peak for part, peak in _PEAKS.items() if part in name]
        if known:
            return known[0]
    a, b = torch.rand(1024, 1024, device=device), torch.rand(1024, 1024, device=device)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        a @ b
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * 1024**3 / best
