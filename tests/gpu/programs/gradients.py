"""gradients.py PLATFORM PARTS SHAPE MOVED FILE: gradients of one update, by Transformer Engine or torch's parts.

PARTS is `te` or `torch`; MOVED is the share of its size by which every weight is moved first, at random. FILE gets the
gradients of all parameters (safetensors), with the loss in its metadata.
"""

from __future__ import annotations

import sys
import types
from typing import Any

import torch
from safetensors.torch import save_file

from megatron_r1.config.model import AttentionConfig, ModelConfig, MoeConfig, MtpConfig
from megatron_r1.config.parallel import ParallelConfig
from megatron_r1.platform import select


def shape_of(name: str) -> ModelConfig:
    """`small`, or one dense and one sparse layer of DeepSeek-V3's full width."""
    if name == "small":
        return ModelConfig(dtype="bf16", init_std=0.08)
    heads = AttentionConfig(
        q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128
    )
    experts = MoeConfig(num_experts=4, top_k=2, ffn_hidden_size=2048, num_groups=2, group_top_k=1)
    return ModelConfig(
        num_layers=2, hidden_size=7168, num_attention_heads=128, ffn_hidden_size=18432, vocab_size=4096, dtype="bf16",
        init_std=0.006, attention=heads, moe=experts, mtp=MtpConfig(num_layers=0),
    )  # fmt: skip


def main(device: str, parts: str, shape: str, moved: float, file: str) -> None:
    if parts == "torch":
        modules: dict[str, Any] = sys.modules
        modules["transformer_engine"] = None
    platform = select(device)
    if device == "cuda":
        assert platform.transformer_engine == (parts == "te"), "not the parts that were requested"
    from megatron_r1.model.build import build_model
    from megatron_r1.parallel.mesh import process_groups
    from megatron_r1.train.stream import next_token_forward
    from tests.support.gradients import gradients_of

    draw = torch.Generator().manual_seed(0)
    with process_groups(platform, ParallelConfig(), seed=0, threads=1, timeout_minutes=10):
        model = build_model(shape_of(shape), ParallelConfig(), platform, seed=0)
        if moved:
            move(model, moved)
        length = 128 if shape == "small" else 512
        rows_BL = torch.randint(0, 512, (4, length + 1), generator=draw).to(platform.device)
        reader = types.SimpleNamespace(forward=next_token_forward)
        gradients, loss = gradients_of(model, rows_BL.split(2), reader, length)
        save_file({name: gradient.cpu() for name, gradient in gradients.items()}, file, {"loss": repr(loss)})


@torch.no_grad()
def move(model: torch.nn.Module, share: float) -> None:
    """Move every weight by a share of its tensor's typical size."""
    noise = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        step = torch.randn(parameter.shape, generator=noise).to(parameter)
        parameter.add_(step * parameter.float().square().mean().sqrt().to(parameter) * share)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], float(sys.argv[4]), sys.argv[5])
