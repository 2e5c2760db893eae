"""Models with grouped-query attention: Qwen2 (and 2.5), Qwen3, Llama, and Qwen3-MoE, which has experts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from megatron_r1.config.model import GroupedAttentionConfig, ModelConfig, MoeConfig, MtpConfig
from megatron_r1.hf.families.family import Family
from megatron_r1.hf.param_mapping import (
    ParamMapping,
    dense_feed_forward,
    linear_weight,
    same_tensor,
    sparse_feed_forward,
)


class _Grouped(Family):
    """What all of them share."""

    qkv_bias: bool = False
    qk_norm: bool = False
    sparse: bool = False

    def has(self, model: ModelConfig) -> bool:
        attention = model.attention
        return isinstance(attention, GroupedAttentionConfig) and (self.qkv_bias, self.qk_norm, self.sparse) == (
            attention.qkv_bias,
            attention.qk_norm,
            model.moe.num_experts > 0,
        )

    def check(self, model: ModelConfig) -> None:
        """Everything that a ModelConfig with grouped attention can say is computed alike elsewhere."""

    def mappings(self, model: ModelConfig, include_mtp: bool) -> list[ParamMapping]:
        hidden, vocab = model.hidden_size, model.vocab_size
        table = [same_tensor("embedding.word_embeddings.weight", "model.embed_tokens.weight", vocab, hidden)]
        for layer in range(model.num_layers):
            table += _layer(model, f"decoder.layers.{layer}", f"model.layers.{layer}")
        table.append(same_tensor("decoder.final_layernorm.weight", "model.norm.weight", hidden))
        if not model.tied_embeddings:
            table.append(same_tensor("output_layer.weight", "lm_head.weight", vocab, hidden))
        return table

    def config(self, model: ModelConfig, include_mtp: bool) -> dict[str, Any]:
        attention = _grouped(model)
        keys: dict[str, Any] = {"num_key_value_heads": attention.num_key_value_heads}
        # Qwen2's releases leave the head's width to be derived.
        if self is not QWEN2 or attention.head_dim * model.num_attention_heads != model.hidden_size:
            keys["head_dim"] = attention.head_dim
        return keys | self.fixed

    def sections(self, config: dict[str, Any]) -> dict[str, Any]:
        heads = config["num_attention_heads"]
        attention = GroupedAttentionConfig(
            num_key_value_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            qkv_bias=self.qkv_bias,
            qk_norm=self.qk_norm,
        )
        return {
            "attention": attention,
            "moe": self._moe(config),
            "mtp": MtpConfig(num_layers=0),
            "tied_embeddings": config.get("tie_word_embeddings", False),
        }

    def _moe(self, config: dict[str, Any]) -> MoeConfig:
        return MoeConfig.none()


class _Qwen2(_Grouped):
    model_type, architecture, qkv_bias = "qwen2", "Qwen2ForCausalLM", True
    fixed: ClassVar = {"hidden_act": "silu", "use_sliding_window": False}


class _Qwen3(_Grouped):
    model_type, architecture, qk_norm = "qwen3", "Qwen3ForCausalLM", True
    fixed: ClassVar = {
        "attention_bias": False,
        "hidden_act": "silu",
        "use_sliding_window": False,
    }


class _Qwen3Moe(_Qwen3):
    model_type, architecture, sparse = "qwen3_moe", "Qwen3MoeForCausalLM", True

    def config(self, model: ModelConfig, include_mtp: bool) -> dict[str, Any]:
        moe = model.moe
        return super().config(model, include_mtp) | {
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "moe_intermediate_size": moe.ffn_hidden_size,
            "norm_topk_prob": moe.score_function == "softmax_topk",
            "num_experts": moe.num_experts,
            "num_experts_per_tok": moe.top_k,
            "output_router_logits": False,
            "router_aux_loss_coef": 0.001,
        }

    def _moe(self, config: dict[str, Any]) -> MoeConfig:
        # SGLang gives every layer experts, whatever these two keys say.
        if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
            raise ValueError("mlp_only_layers must be [] and decoder_sparse_step 1: every layer has experts")
        return MoeConfig(
            # transformers 5 writes the second name.
            num_experts=config["num_experts"] if "num_experts" in config else config["num_local_experts"],
            top_k=config["num_experts_per_tok"],
            ffn_hidden_size=config["moe_intermediate_size"],
            num_shared_experts=0,
            first_dense_layers=0,
            num_groups=1,
            # Without the key, transformers does not normalise.
            score_function="softmax_topk" if config.get("norm_topk_prob") else "softmax",
            scaling_factor=1.0,
            bias_update_rate=0.0,
        )


class _Llama(_Grouped):
    model_type, architecture = "llama", "LlamaForCausalLM"
    fixed: ClassVar = {
        "attention_bias": False,
        "hidden_act": "silu",
        "mlp_bias": False,
        "pretraining_tp": 1,
    }


def _grouped(model: ModelConfig) -> GroupedAttentionConfig:
    assert isinstance(model.attention, GroupedAttentionConfig)
    return model.attention


def _layer(model: ModelConfig, native: str, hf: str) -> Iterator[ParamMapping]:
    hidden, attention = model.hidden_size, _grouped(model)
    query = model.num_attention_heads * attention.head_dim
    key_value, groups = attention.num_key_value_heads * attention.head_dim, attention.num_key_value_heads
    core, other = f"{native}.self_attention", f"{hf}.self_attn"

    def queries_keys_values(kind: str, *columns: int) -> ParamMapping:
        names = tuple(f"{other}.{part}_proj.{kind}" for part in "qkv")
        shapes = tuple((rows, *columns) for rows in (query, key_value, key_value))
        return ParamMapping(f"{core}.linear_qkv.{kind}", names, shapes, groups=groups, quantised=kind == "weight")

    # The norm before attention is fused into the first map.
    yield same_tensor(f"{core}.linear_qkv.layer_norm_weight", f"{hf}.input_layernorm.weight", hidden)
    yield queries_keys_values("weight", hidden)
    if attention.qkv_bias:
        yield queries_keys_values("bias")
    if attention.qk_norm:
        yield same_tensor(f"{core}.q_layernorm.weight", f"{other}.q_norm.weight", attention.head_dim)
        yield same_tensor(f"{core}.k_layernorm.weight", f"{other}.k_norm.weight", attention.head_dim)
    yield linear_weight(f"{core}.linear_proj.weight", f"{other}.o_proj.weight", hidden, query)
    if model.moe.num_experts:
        yield from sparse_feed_forward(native, hf, hidden, model.moe)
    else:
        yield from dense_feed_forward(native, hf, hidden, model.ffn_hidden_size)


QWEN2 = _Qwen2()
QWEN3 = _Qwen3()
QWEN3_MOE = _Qwen3Moe()
LLAMA = _Llama()
