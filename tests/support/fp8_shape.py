"""A small model whose weights' blocks of 128 are the same on two tensor-parallel ranks as on one."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_r1.config.model import AttentionConfig, ModelConfig, MoeConfig
from megatron_r1.parallel.mesh import tensor_parallel_group


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


def gradient_squares(model: Any, tokens_BL: Tensor) -> dict[str, float]:
    """Sum of squares of the whole gradient of each matrix, and the loss, of a pass in float64; changes the model.

    In fp32 two layouts sum in different orders, as do the kernels of different processors. A number near the middle
    between two of FP8 then rounds the other way, by a sixteenth of it, and all that follows of its token with it. In
    float64 orders differ by 1e-16: what FP8 rounds is the same everywhere. The loss is a fixed combination of the
    logits, because megatron-core's cross-entropy computes in fp32.
    """
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
    from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler

    for scaler in (MoEAuxLossAutoScaler, MTPLossAutoScaler):
        scaler.set_loss_scale(torch.ones(1))  # of the whole process: the last schedule's, or not there yet
    rank, ranks = dist.get_rank(tensor_parallel_group()), dist.get_world_size(tensor_parallel_group())
    model.double()
    model.config.moe_router_dtype = "fp64"
    generator, passes = torch.Generator().manual_seed(5), 0

    def combination(labels_BL: Tensor, logits_LBV: Tensor) -> Tensor:
        nonlocal passes
        passes += 1
        shape = (*labels_BL.shape, logits_LBV.shape[-1] * ranks)
        coefficients_BLV = torch.randn(shape, generator=generator, dtype=torch.float64).chunk(ranks, -1)[rank]
        return (logits_LBV.transpose(0, 1) * coefficients_BLV).sum(-1)

    model.compute_language_model_loss = combination
    inputs_BL, labels_BL = tokens_BL[:, :-1], tokens_BL[:, 1:]
    positions_BL = torch.arange(inputs_BL.shape[1]).expand_as(inputs_BL)
    loss = model(inputs_BL, positions_BL, None, labels=labels_BL, loss_mask=torch.ones(labels_BL.shape)).sum()
    loss.backward()
    assert passes == 1  # the extra predictions have their own loss
    dist.all_reduce(total := loss.detach().clone(), group=tensor_parallel_group())
    found = {"loss": float(total)}
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            continue
        assert parameter.grad is not None and parameter.grad.dtype == torch.float64
        if getattr(parameter, "sequence_parallel", False):  # each rank has the gradient of its own tokens
            dist.all_reduce(parameter.grad, group=tensor_parallel_group())
        square = parameter.grad.square().sum()
        if getattr(parameter, "tensor_model_parallel", False) or ".experts." in name:
            dist.all_reduce(square, group=tensor_parallel_group())
        found[name] = float(square)
    return found
