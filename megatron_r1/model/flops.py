"""Floating-point operations of the model, in DeepSeek's accounting.

FLOPs per token = 6 N + 3 L 2 S H (D_qk + D_v) / 2 under causal attention, N being the parameters that a token
visits without the input embedding and without multi-token prediction. Model FLOPs utilisation divides by the peak of
the parameter type ("Insights into DeepSeek-V3", table 4, counts it this way).
"""

from __future__ import annotations

import time

import torch

from megatron_r1.config.hardware import GPUS
from megatron_r1.config.model import GroupedAttentionConfig, ModelConfig
from megatron_r1.model.parameters import activated_parameters


def flops_per_token(model: ModelConfig, sequence_length: int) -> float:
    """Forward and backward FLOPs of one token in a sequence of `sequence_length`, under causal attention."""
    attention = model.attention
    if isinstance(attention, GroupedAttentionConfig):
        widths = 2 * attention.head_dim
    else:
        widths = attention.qk_nope_head_dim + attention.qk_rope_head_dim + attention.v_head_dim
    scores = 3 * model.num_layers * 2 * sequence_length * model.num_attention_heads * widths
    return 6 * activated_parameters(model) + scores / 2


def peak_flops(device: str) -> float:
    """Peak FLOP/s of one rank's device: the datasheet's for known GPUs, else of a measured matrix product.

    On the CPU it is the best of several 1024-cube fp32 products with this process's threads.
    """
    if device.startswith("cuda"):
        name = torch.cuda.get_device_name()
        # GB200 before B200, whose name it contains.
        known = [gpu for part, gpu in sorted(GPUS.items(), key=lambda one: -len(one[0])) if part in name]
        if known:
            return known[0].bf16
    # No random numbers: a run that resumes measures after it has restored its random state.
    a, b = torch.ones(1024, 1024, device=device), torch.ones(1024, 1024, device=device)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        a @ b
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * 1024**3 / best
