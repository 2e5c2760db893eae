"""A small model whose weights' blocks of 128 are the same on two tensor-parallel ranks as on one."""

from __future__ import annotations

from typing import Any

import torch

from megatron_r1.config.model import AttentionConfig, ModelConfig, MoeConfig


def fp8_shape() -> ModelConfig:
    """Every side that ranks share is a multiple of 256; the key-value latent with its rotary part ends in a block."""
    return ModelConfig(
        num_layers=2,
        hidden_size=128,
        num_attention_heads=4,
        ffn_hidden_size=256,
        vocab_size=512,
        init_std=0.08,
        attention=AttentionConfig(
            q_lora_rank=128, kv_lora_rank=128, qk_nope_head_dim=64, qk_rope_head_dim=64, v_head_dim=64
        ),
        moe=MoeConfig(num_experts=4, top_k=2, ffn_hidden_size=256),
    )


def gradient_squares(model: Any, optimizer: Any, rows_BL: torch.Tensor) -> dict[str, float]:
    """Sum of squares of this rank's gradients of the matrices of the multi-token layer, of a pass without an update.

    Being first in the backward pass they differ by layout in fp32 summation alone. Further down that difference now and
    then makes a number round the other way, which is a sixteenth of it.
    """
    from megatron_r1.commands.pretrain import next_token_forward
    from megatron_r1.model.forward_backward import forward_backward

    optimizer.zero_gradients()
    forward_backward(model, optimizer.chunks, rows_BL.split(2), next_token_forward, rows_BL.shape[1] - 1)
    return {
        name: float(parameter.main_grad.square().sum())
        for name, parameter in model.named_parameters()
        if name.startswith("mtp.layers.0.mtp_model_layer.") and parameter.dim() == 2
    }
