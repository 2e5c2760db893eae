"""From this project's model section to megatron-core's configuration."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from megatron_r1.config.model import DTYPE_NAMES, AttentionConfig, GroupedAttentionConfig, ModelConfig
from megatron_r1.config.parallel import ParallelConfig
from megatron_r1.config.performance import PerformanceConfig, recomputed_modules
from megatron_r1.model.attention_kernels import chosen_attention

DTYPES: dict[str, torch.dtype] = {dtype: getattr(torch, name) for dtype, name in DTYPE_NAMES.items()}
"""`model.dtype` -> type of the weights."""


def transformer_config(
    model: ModelConfig,
    parallel: ParallelConfig,
    performance: PerformanceConfig,
    *,
    fused: bool,
    fp8: bool = False,
) -> TransformerConfig:
    """megatron-core's description of the model.

    Args:
        model: shape of the model.
        parallel: degrees of parallelism.
        performance: recomputation, overlap and fusion.
        fused: whether fused CUDA kernels may be used.
        fp8: whether Transformer Engine multiplies in FP8; on a CPU it is the modules that do.
    """
    common = _shape(model) | _feed_forward(model) | _execution(model, parallel, fused)
    common |= _performance(performance, model)
    if fused:
        common |= {"attention_backend": chosen_attention(os.environ)}
    if fp8:
        common |= {"fp8": "e4m3", "fp8_recipe": "blockwise"}
    if isinstance(model.attention, GroupedAttentionConfig):
        return TransformerConfig(**common, **_grouped_attention(model, model.attention))
    return MLATransformerConfig(**common, **_latent_attention(model, model.attention))


def _shape(model: ModelConfig) -> dict[str, Any]:
    init = _normal(model.init_std)
    return {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "ffn_hidden_size": model.ffn_hidden_size,
        "normalization": "RMSNorm",
        "layernorm_epsilon": model.norm_epsilon,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "mtp_num_layers": model.mtp.num_layers or None,
        "mtp_loss_scaling_factor": model.mtp.loss_coefficient,
        # DeepSeek uses one deviation everywhere; megatron-core would shrink output projections by 1/sqrt(2L).
        "init_method": init,
        "output_layer_init_method": init,
        "embedding_init_method": init,
    }


def _normal(std: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def initialise(tensor: torch.Tensor) -> torch.Tensor:
        return torch.nn.init.normal_(tensor, mean=0.0, std=std)

    return initialise


def _grouped_attention(model: ModelConfig, attention: GroupedAttentionConfig) -> dict[str, Any]:
    return {
        "num_query_groups": attention.num_key_value_heads,
        "kv_channels": attention.head_dim,
        "add_qkv_bias": attention.qkv_bias,
        "qk_layernorm": attention.qk_norm,
    }


def _latent_attention(model: ModelConfig, attention: AttentionConfig) -> dict[str, Any]:
    rope = model.rope
    extended = rope.factor > 1
    return {
        "multi_latent_attention": True,
        "qk_layernorm": True,
        "q_lora_rank": attention.q_lora_rank or None,
        "kv_lora_rank": attention.kv_lora_rank,
        "qk_head_dim": attention.qk_nope_head_dim,
        "qk_pos_emb_head_dim": attention.qk_rope_head_dim,
        "v_head_dim": attention.v_head_dim,
        # The softmax temperature follows the factor whatever the type of rotary positions: 1 leaves it alone.
        "rope_type": "yarn" if extended else "rope",
        "rotary_base": rope.base,
        "rotary_scaling_factor": rope.factor,
        "original_max_position_embeddings": rope.original_max_position,
        "beta_fast": rope.beta_fast,
        "beta_slow": rope.beta_slow,
        "mscale": rope.mscale,
        "mscale_all_dim": rope.mscale_all_dim,
    }


def _feed_forward(model: ModelConfig) -> dict[str, Any]:
    if model.moe.num_experts:
        return _experts(model)
    # A list, though all layers are alike: else sharding metadata would stack the layers into one tensor.
    return {"moe_layer_freq": [0] * model.num_layers}


def _experts(model: ModelConfig) -> dict[str, Any]:
    moe = model.moe
    biased = moe.score_function == "sigmoid"
    return {
        "num_moe_experts": moe.num_experts,
        "moe_router_topk": moe.top_k,
        "moe_ffn_hidden_size": moe.ffn_hidden_size,
        "moe_shared_expert_intermediate_size": moe.num_shared_experts * moe.ffn_hidden_size or None,
        "moe_layer_freq": [int(layer >= moe.first_dense_layers) for layer in range(model.num_layers)],
        "moe_router_num_groups": moe.num_groups if moe.num_groups > 1 else None,
        "moe_router_group_topk": moe.group_top_k if moe.num_groups > 1 else None,
        "moe_router_score_function": moe.score_function.removesuffix("_topk"),
        "moe_router_topk_scaling_factor": moe.scaling_factor,
        "moe_router_enable_expert_bias": biased,
        "moe_router_bias_update_rate": moe.bias_update_rate,
        "moe_router_load_balancing_type": "seq_aux_loss" if moe.sequence_loss_coefficient else "none",
        "moe_aux_loss_coeff": moe.sequence_loss_coefficient,
        "moe_router_dtype": "fp32",
        # A softmax over the chosen experts alone is one over all, normalised over the chosen.
        "moe_router_pre_softmax": moe.score_function != "softmax_topk",
        "moe_grouped_gemm": True,
    }


def _execution(model: ModelConfig, parallel: ParallelConfig, fused: bool) -> dict[str, Any]:
    interleaved = parallel.virtual_pipeline > 1
    return {
        "params_dtype": DTYPES[model.dtype],
        "bf16": model.dtype == "bf16",
        "pipeline_dtype": DTYPES[model.dtype],
        "tensor_model_parallel_size": parallel.tensor,
        "sequence_parallel": parallel.tensor > 1,
        "pipeline_model_parallel_size": parallel.pipeline,
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline if interleaved else None,
        "microbatch_group_size_per_vp_stage": parallel.microbatch_group_size_per_vp_stage or None,
        "pipeline_model_parallel_layout": _stages(model, parallel),
        "context_parallel_size": parallel.context,
        "expert_model_parallel_size": parallel.expert,
        "expert_tensor_parallel_size": parallel.expert_tensor,
        # Stages tell one another the shape of what they send: micro-batches differ in rows and length. Interleaved ones
        # cannot: where two ranks are each other's previous and next, batched messages reach the wrong of the two.
        "variable_seq_lengths": parallel.pipeline > 1 and not interleaved,
        "batch_p2p_comm": not interleaved,
        "overlap_p2p_comm": interleaved,
        "use_cpu_initialization": not fused,
        "bias_activation_fusion": fused,
        "bias_dropout_fusion": fused,
        "masked_softmax_fusion": fused,
        "persist_layer_norm": fused,
        "moe_permute_fusion": fused,
        # The torch modules' own, which stand where megatron-core looks for Transformer Engine's.
        "use_te_activation_func": not fused,
        "cross_entropy_loss_fusion": not fused,
        "cross_entropy_fusion_impl": "native" if fused else "te",
    }


def _performance(performance: PerformanceConfig, model: ModelConfig) -> dict[str, Any]:
    recomputed = recomputed_modules(performance, model)
    flexible = performance.moe_token_dispatcher_type in ("deepep", "hybridep")
    return {
        "recompute_granularity": "selective" if recomputed else None,
        "recompute_modules": recomputed,
        "moe_token_dispatcher_type": "flex" if flexible else performance.moe_token_dispatcher_type,
        **({"moe_flex_dispatcher_backend": performance.moe_token_dispatcher_type} if flexible else {}),
        "overlap_moe_expert_parallel_comm": performance.overlap_moe_expert_parallel_comm,
        "delay_wgrad_compute": performance.delay_wgrad_compute,
        "moe_shared_expert_overlap": performance.moe_shared_expert_overlap,
        "gradient_accumulation_fusion": performance.gradient_accumulation_fusion,
        "apply_rope_fusion": performance.apply_rope_fusion,
    }


def _stages(model: ModelConfig, parallel: ParallelConfig) -> list[list[str]] | None:
    """What each stage holds, as megatron-core spells it; None where it divides the layers itself."""
    written = parallel.pipeline_layers or parallel.pipeline_layout
    if not written and model.num_layers % parallel.stages == 0:
        return None
    return [stage.words() for stage in parallel.stages_of(model.num_layers, model.mtp.num_layers)]
