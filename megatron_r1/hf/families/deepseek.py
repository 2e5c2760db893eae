"""DeepSeek-V3 (and Moonlight, which is one) and DeepSeek-V2: names and config.json.

Hugging Face numbers the multi-token layers after the decoder layers and stores the embedding and the head a second
time in each of them; megatron-core shares those two, so there they are `copies` of a mapping
and not mappings of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from megatron_r1.config.model import AttentionConfig, ModelConfig, MoeConfig, MtpConfig
from megatron_r1.errors import ConfigError
from megatron_r1.hf.families.family import Family
from megatron_r1.hf.param_mapping import (
    ParamMapping,
    dense_feed_forward,
    linear_weight,
    same_tensor,
    sparse_feed_forward,
)

LATENT_NORM_EPSILON = 1e-6
"""DeepSeek's modelling code fixes this for the norms of the latents, whatever `rms_norm_eps` says."""


class _DeepSeek(Family):
    """What both generations share."""

    score_function: str

    def has(self, model: ModelConfig) -> bool:
        return isinstance(model.attention, AttentionConfig) and model.moe.score_function == self.score_function

    def check(self, model: ModelConfig) -> None:
        epsilon, rope = _latent(model).norm_epsilon, model.rope
        if epsilon != LATENT_NORM_EPSILON:
            allowed = f"must be {LATENT_NORM_EPSILON} to be exported"
            raise ConfigError("model.attention.norm_epsilon", epsilon, allowed)
        if rope.factor > 1 and not (rope.mscale and rope.mscale_all_dim) and rope.mscale != 1:
            # DeepSeek's code and transformers part ways where only one temperature is given.
            raise ConfigError("model.rope.mscale", rope.mscale, "must be 1.0 where mscale_all_dim=0 to be exported")

    def mappings(self, model: ModelConfig, include_mtp: bool) -> list[ParamMapping]:
        hidden, vocab = model.hidden_size, model.vocab_size
        mtp_layers = [model.num_layers + depth for depth in range(model.mtp.num_layers if include_mtp else 0)]
        embedding_copies = tuple(f"model.layers.{layer}.embed_tokens.weight" for layer in mtp_layers)
        head_copies = tuple(f"model.layers.{layer}.shared_head.head.weight" for layer in mtp_layers)
        embedding = ("embedding.word_embeddings.weight", "model.embed_tokens.weight")
        table = [same_tensor(*embedding, vocab, hidden, copies=embedding_copies)]
        for layer in range(model.num_layers):
            dense = layer < model.moe.first_dense_layers
            table += _layer(model, f"decoder.layers.{layer}", f"model.layers.{layer}", dense)
        table.append(same_tensor("decoder.final_layernorm.weight", "model.norm.weight", hidden))
        table.append(same_tensor("output_layer.weight", "lm_head.weight", vocab, hidden, copies=head_copies))
        for depth, layer in enumerate(mtp_layers):
            table += _multi_token_layer(model, f"mtp.layers.{depth}", f"model.layers.{layer}")
        return table

    def config(self, model: ModelConfig, include_mtp: bool) -> dict[str, Any]:
        attention, moe = _latent(model), model.moe
        return {
            "attention_bias": False,
            "ep_size": 1,
            "first_k_dense_replace": moe.first_dense_layers,
            "kv_lora_rank": attention.kv_lora_rank,
            "moe_intermediate_size": moe.ffn_hidden_size,
            "moe_layer_freq": 1,
            "n_group": moe.num_groups,
            "n_routed_experts": moe.num_experts,
            "n_shared_experts": moe.num_shared_experts,
            "num_experts_per_tok": moe.top_k,
            "num_key_value_heads": model.num_attention_heads,
            "q_lora_rank": attention.q_lora_rank or None,
            "qk_nope_head_dim": attention.qk_nope_head_dim,
            "qk_rope_head_dim": attention.qk_rope_head_dim,
            "routed_scaling_factor": moe.scaling_factor,
            "scoring_func": self.score_function,
            "topk_group": moe.group_top_k,
            "v_head_dim": attention.v_head_dim,
        }

    def sections(self, config: dict[str, Any]) -> dict[str, Any]:
        if config.get("num_key_value_heads", config["num_attention_heads"]) != config["num_attention_heads"]:
            raise ValueError("num_key_value_heads must equal num_attention_heads")
        attention = AttentionConfig(
            q_lora_rank=config["q_lora_rank"] or 0,
            kv_lora_rank=config["kv_lora_rank"],
            qk_nope_head_dim=config["qk_nope_head_dim"],
            qk_rope_head_dim=config["qk_rope_head_dim"],
            v_head_dim=config["v_head_dim"],
            norm_epsilon=LATENT_NORM_EPSILON,
        )
        groups, open_groups = self._groups(config)
        moe = MoeConfig(
            num_experts=config["n_routed_experts"],
            top_k=config["num_experts_per_tok"],
            ffn_hidden_size=config["moe_intermediate_size"],
            num_shared_experts=config["n_shared_experts"] or 0,
            first_dense_layers=config["first_k_dense_replace"],
            num_groups=groups,
            group_top_k=open_groups,
            score_function=self.score_function,
            scaling_factor=config["routed_scaling_factor"],
        )
        extra = config.get("num_nextn_predict_layers", config.get("num_mtp_layers", 0))
        return {"attention": attention, "moe": moe, "mtp": MtpConfig(num_layers=extra)}

    def _groups(self, config: dict[str, Any]) -> tuple[int, int]:
        return config["n_group"], config["topk_group"]


class _DeepSeekV3(_DeepSeek):
    model_type, architecture, score_function = "deepseek_v3", "DeepseekV3ForCausalLM", "sigmoid"
    fixed: ClassVar = {
        "attention_bias": False,
        "hidden_act": "silu",
        "moe_layer_freq": 1,
        "norm_topk_prob": True,
        "rope_interleave": True,
        "scoring_func": "sigmoid",
        "tie_word_embeddings": False,
        "topk_method": "noaux_tc",
    }

    def check(self, model: ModelConfig) -> None:
        super().check(model)
        moe = model.moe
        if moe.num_experts // moe.num_groups < 2:
            raise ConfigError("model.moe.num_groups", moe.num_groups, "must leave at least 2 experts in a group")
        if moe.top_k < 2:
            # DeepSeek's code leaves a single gate as it is, transformers normalises it to 1.
            raise ConfigError("model.moe.top_k", moe.top_k, "must be at least 2 to be exported")

    def config(self, model: ModelConfig, include_mtp: bool) -> dict[str, Any]:
        extra = model.mtp.num_layers if include_mtp else 0
        own = {"norm_topk_prob": True, "num_nextn_predict_layers": extra, "topk_method": "noaux_tc"}
        return super().config(model, include_mtp) | own


class _DeepSeekV2(_DeepSeek):
    model_type, architecture, score_function = "deepseek_v2", "DeepseekV2ForCausalLM", "softmax"
    fixed: ClassVar = {
        "attention_bias": False,
        "hidden_act": "silu",
        "mlp_bias": False,
        "moe_layer_freq": 1,
        "norm_topk_prob": False,
        "scoring_func": "softmax",
        "tie_word_embeddings": False,
    }

    def check(self, model: ModelConfig) -> None:
        super().check(model)
        if not model.moe.num_shared_experts:
            raise ConfigError("model.moe.num_shared_experts", 0, "must be at least 1: DeepSeek-V2 code has no other")

    def config(self, model: ModelConfig, include_mtp: bool) -> dict[str, Any]:
        method = "greedy" if model.moe.num_groups == 1 else "group_limited_greedy"
        own = {"aux_loss_alpha": 0.001, "norm_topk_prob": False, "seq_aux": True, "topk_method": method}
        return super().config(model, include_mtp) | own

    def _groups(self, config: dict[str, Any]) -> tuple[int, int]:
        method = config.get("topk_method", "greedy")
        if method not in ("greedy", "group_limited_greedy"):
            raise ValueError(f"topk_method={method}: must be greedy or group_limited_greedy")
        return (1, 1) if method == "greedy" else super()._groups(config)


def _latent(model: ModelConfig) -> AttentionConfig:
    assert isinstance(model.attention, AttentionConfig)
    return model.attention


def _layer(model: ModelConfig, native: str, hf: str, dense: bool) -> Iterator[ParamMapping]:
    hidden = model.hidden_size
    yield same_tensor(f"{native}.input_layernorm.weight", f"{hf}.input_layernorm.weight", hidden)
    yield from _attention(model, f"{native}.self_attention", f"{hf}.self_attn")
    if dense:
        yield from dense_feed_forward(native, hf, hidden, model.ffn_hidden_size)
    else:
        yield from sparse_feed_forward(native, hf, hidden, model.moe)


def _attention(model: ModelConfig, native: str, hf: str) -> Iterator[ParamMapping]:
    hidden, heads, attention = model.hidden_size, model.num_attention_heads, _latent(model)
    query = heads * (attention.qk_nope_head_dim + attention.qk_rope_head_dim)
    query_rank, latent = attention.q_lora_rank, attention.kv_lora_rank
    if query_rank:
        yield linear_weight(f"{native}.linear_q_down_proj.weight", f"{hf}.q_a_proj.weight", query_rank, hidden)
        yield same_tensor(f"{native}.linear_q_up_proj.layer_norm_weight", f"{hf}.q_a_layernorm.weight", query_rank)
        yield linear_weight(f"{native}.linear_q_up_proj.weight", f"{hf}.q_b_proj.weight", query, query_rank)
    else:
        yield linear_weight(f"{native}.linear_q_proj.weight", f"{hf}.q_proj.weight", query, hidden)
    down, up = latent + attention.qk_rope_head_dim, heads * (attention.qk_nope_head_dim + attention.v_head_dim)
    yield linear_weight(f"{native}.linear_kv_down_proj.weight", f"{hf}.kv_a_proj_with_mqa.weight", down, hidden)
    yield same_tensor(f"{native}.linear_kv_up_proj.layer_norm_weight", f"{hf}.kv_a_layernorm.weight", latent)
    yield linear_weight(f"{native}.linear_kv_up_proj.weight", f"{hf}.kv_b_proj.weight", up, latent)
    yield linear_weight(f"{native}.linear_proj.weight", f"{hf}.o_proj.weight", hidden, heads * attention.v_head_dim)


def _multi_token_layer(model: ModelConfig, native: str, hf: str) -> Iterator[ParamMapping]:
    hidden = model.hidden_size
    yield same_tensor(f"{native}.enorm.weight", f"{hf}.enorm.weight", hidden)
    yield same_tensor(f"{native}.hnorm.weight", f"{hf}.hnorm.weight", hidden)
    yield same_tensor(f"{native}.eh_proj.weight", f"{hf}.eh_proj.weight", hidden, 2 * hidden)
    yield from _layer(model, f"{native}.mtp_model_layer", hf, dense=False)
    yield same_tensor(f"{native}.final_layernorm.weight", f"{hf}.shared_head.norm.weight", hidden)


DEEPSEEK_V3 = _DeepSeekV3()
DEEPSEEK_V2 = _DeepSeekV2()
