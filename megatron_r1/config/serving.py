"""What SGLang serves of a model: checked, and on a GPU chosen, before a server is started.

By reading SGLang 0.5.23 and its kernels (FlashAttention 3, FlashMLA, FlashInfer): on CUDA they take 16-bit numbers, and
attention has compiled kernels for the published sizes alone; triton compiles its own for any size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from megatron_r1.config.model import GroupedAttentionConfig, ModelConfig
from megatron_r1.config.sglang import AUTO, ServerConfig
from megatron_r1.errors import ConfigError

ANY_SIZE = ("triton", "torch_native", "flex_attention")
"""Attention backends without compiled sizes."""
LATENT_SIZES = {
    "fa3": (range(256, 513), range(1, 65)),
    "flashinfer": (range(512, 513), range(64, 65)),
    "flashmla": (range(512, 513), range(64, 65)),
    "trtllm_mla": (range(512, 513), range(64, 65)),
    "cutedsl_mla": (range(512, 513), range(64, 65)),
}
"""Attention backend -> widths of latents and of rotary positions that its kernels for latent attention take."""
HEAD_SIZES = {
    "fa3": range(8, 257, 8),
    "fa4": (64, 96, 128),
    "flashinfer": (64, 128, 256),
    "trtllm_mha": (64, 128, 256),
}
"""Attention backend -> widths of a head that its kernels for grouped attention take."""
PUBLISHED_LATENTS, PUBLISHED_HEADS = (512, 64), (64, 128, 256)
"""Sizes for which SGLang's own choice of a backend has kernels on every GPU that it knows."""
FP8_BLOCK = 128


def check_division(server: ServerConfig, model: ModelConfig) -> None:
    """Refuse a division of the model among a server's ranks that SGLang refuses.

    Raises:
        ConfigError: names the degree.
    """
    groups = server.tensor_parallel // server.data_parallel_attention
    if model.num_attention_heads % groups:
        allowed = f"must divide model.num_attention_heads={model.num_attention_heads} heads among {groups} ranks"
        raise ConfigError("rollout.sglang.server.tensor_parallel", server.tensor_parallel, allowed)
    if model.moe.num_experts % server.expert_parallel:
        allowed = f"must divide model.moe.num_experts={model.moe.num_experts}"
        raise ConfigError("rollout.sglang.server.expert_parallel", server.expert_parallel, allowed)
    if server.quantization == "fp8":
        for name, width, ranks in _quantised_widths(server, model):
            if width % ranks or width // ranks % FP8_BLOCK:
                allowed = f"must leave each rank a multiple of {FP8_BLOCK} of {name}={width}, the side of an FP8 block"
                raise ConfigError("rollout.sglang.server.tensor_parallel", server.tensor_parallel, allowed)


def _quantised_widths(server: ServerConfig, model: ModelConfig) -> Iterator[tuple[str, int, int]]:
    """Name and width of what a server's ranks divide of linear layers in FP8, and among how many of them."""
    ranks, heads, moe = server.tensor_parallel, model.num_attention_heads, model.moe
    groups, attention = ranks // server.data_parallel_attention, model.attention
    if moe.first_dense_layers or not moe.num_experts:
        yield "model.ffn_hidden_size", model.ffn_hidden_size, ranks
    if moe.num_experts:
        yield "model.moe.ffn_hidden_size", moe.ffn_hidden_size, ranks // server.expert_parallel
    if moe.num_shared_experts and server.expert_dispatch == "none":
        yield "model.moe.num_shared_experts x ffn_hidden_size", moe.num_shared_experts * moe.ffn_hidden_size, ranks
    if isinstance(attention, GroupedAttentionConfig):
        yield "model.num_attention_heads x attention.head_dim", heads * attention.head_dim, groups
    elif groups > 1:
        queries = attention.qk_nope_head_dim + attention.qk_rope_head_dim
        yield "model.num_attention_heads x (qk_nope_head_dim + qk_rope_head_dim)", heads * queries, groups
        yield "model.num_attention_heads x v_head_dim", heads * attention.v_head_dim, groups


def on_cuda(server: ServerConfig, model: ModelConfig) -> ServerConfig:
    """The options of servers on a GPU: triton's attention where the model's sizes have no compiled kernels.

    Raises:
        ConfigError: the kernels do not take the model's numbers, or the named attention backend not its sizes.
    """
    if model.dtype == "fp32":
        allowed = "must be bf16 with rollout.engine=sglang on a GPU: SGLang's kernels take 16-bit numbers"
        raise ConfigError("model.dtype", "fp32", allowed)
    if server.attention_backend == AUTO:
        return server if _published(model) else replace(server, attention_backend="triton")
    if server.attention_backend not in ANY_SIZE and (sizes := _unserved_sizes(server.attention_backend, model)):
        allowed = f"has no kernels for {sizes}: must be auto or one of {', '.join(ANY_SIZE)}"
        raise ConfigError("rollout.sglang.server.attention_backend", server.attention_backend, allowed)
    return server


def _published(model: ModelConfig) -> bool:
    attention = model.attention
    if isinstance(attention, GroupedAttentionConfig):
        return attention.head_dim in PUBLISHED_HEADS
    return (attention.kv_lora_rank, attention.qk_rope_head_dim) == PUBLISHED_LATENTS


def _unserved_sizes(backend: str, model: ModelConfig) -> str:
    """What of the model's attention a backend has no kernels for; empty where it has them."""
    attention = model.attention
    if isinstance(attention, GroupedAttentionConfig):
        return "" if attention.head_dim in HEAD_SIZES.get(backend, ()) else f"heads of {attention.head_dim}"
    latents, rotary = LATENT_SIZES.get(backend, ((), ()))
    if attention.kv_lora_rank in latents and attention.qk_rope_head_dim in rotary:
        return ""
    return f"latents of {attention.kv_lora_rank} and rotary positions of {attention.qk_rope_head_dim}"
