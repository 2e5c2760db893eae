"""Dense models with grouped-query attention: Qwen2 (and 2.5), Qwen3 and Llama."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from megatron_r1.config.model import GroupedAttentionConfig, ModelConfig, MoeConfig, MtpConfig
from megatron_r1.hf.families.family import Family
from megatron_r1.hf.param_mapping import ParamMapping, dense_feed_forward, linear_weight, same_tensor


class _Dense(Family):
    """What the three share."""

    qkv_bias: bool = False
    qk_norm: bool = False

    def has(self, model: ModelConfig) -> bool:
        attention = model.attention
        return isinstance(attention, GroupedAttentionConfig) and (self.qkv_bias, self.qk_norm) == (
            attention.qkv_bias,
            attention.qk_norm,
        )

    def check(self, model: ModelConfig) -> None:
        """Everything that a dense ModelConfig can say is computed alike elsewhere."""

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
            "moe": MoeConfig.none(),
            "mtp": MtpConfig(num_layers=0),
            "tied_embeddings": config.get("tie_word_embeddings", False),
        }


class _Qwen2(_Dense):
    model_type, architecture, qkv_bias = "qwen2", "Qwen2ForCausalLM", True
    fixed: ClassVar = {"hidden_act": "silu", "use_sliding_window": False}


class _Qwen3(_Dense):
    model_type, architecture, qk_norm = "qwen3", "Qwen3ForCausalLM", True
    fixed: ClassVar = {
        "attention_bias": False,
        "hidden_act": "silu",
        "use_sliding_window": False,
    }


class _Llama(_Dense):
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
    yield from dense_feed_forward(native, hf, hidden, model.ffn_hidden_size)


QWEN2 = _Qwen2()
QWEN3 = _Qwen3()
LLAMA = _Llama()
