"""Each family's published config.json is the preset's model, there and back, and so is what transformers writes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_r1.config.load import load
from megatron_r1.config.model import GroupedAttentionConfig, ModelConfig, MoeConfig, MtpConfig, RopeConfig
from megatron_r1.errors import DataError
from megatron_r1.hf.config import SpecialTokens, check_exportable, hf_config, serving_view
from megatron_r1.hf.families import FAMILIES, family_of, param_mappings
from megatron_r1.hf.model_config import model_config_from_hf
from megatron_r1.hf.param_mapping import ParamMapping
from tests.support.draws import GROUPED, grouped_shape, sparse_shape
from tests.support.whole_models import export, native_shapes

_COMMON = {"attention_dropout": 0.0, "hidden_act": "silu", "initializer_range": 0.02, "torch_dtype": "bfloat16"}
_QWEN = {"max_window_layers": 28, "rope_theta": 1000000.0, "sliding_window": None, "use_sliding_window": False}
_QWEN3_MOE = {
    "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "bos_token_id": 151643, "decoder_sparse_step": 1,
    "eos_token_id": 151645, "head_dim": 128, "max_position_embeddings": 40960, "mlp_only_layers": [],
    "model_type": "qwen3_moe", "norm_topk_prob": True, "num_experts": 128, "num_experts_per_tok": 8,
    "num_key_value_heads": 4, "output_router_logits": False, "rms_norm_eps": 1e-06, "rope_scaling": None,
    "router_aux_loss_coef": 0.001, "tie_word_embeddings": False, "use_cache": True, "vocab_size": 151936, **_QWEN,
}  # fmt: skip
_LATENT = {
    "attention_bias": False, "first_k_dense_replace": 1, "kv_lora_rank": 512, "moe_intermediate_size": 1408,
    "moe_layer_freq": 1, "n_group": 1, "n_routed_experts": 64, "n_shared_experts": 2, "num_attention_heads": 16,
    "num_experts_per_tok": 6, "num_hidden_layers": 27, "num_key_value_heads": 16, "q_lora_rank": None,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "topk_group": 1, "v_head_dim": 128, "hidden_size": 2048,
    "tie_word_embeddings": False,
}  # fmt: skip
PUBLISHED: dict[str, dict[str, Any]] = {
    "qwen2_5_0_5b": {
        "architectures": ["Qwen2ForCausalLM"], "bos_token_id": 151643, "eos_token_id": 151643, "hidden_size": 896,
        "intermediate_size": 4864, "max_position_embeddings": 32768, "model_type": "qwen2", "num_attention_heads": 14,
        "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "tie_word_embeddings": True,
        "vocab_size": 151936, "max_window_layers": 24, **_QWEN,
    },
    "qwen3_0_6b": {
        "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "bos_token_id": 151643, "head_dim": 128,
        "eos_token_id": 151645, "hidden_size": 1024, "intermediate_size": 3072, "max_position_embeddings": 40960,
        "model_type": "qwen3", "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06, "rope_scaling": None, "tie_word_embeddings": True, "vocab_size": 151936, **_QWEN,
    },
    "qwen3_30b_a3b": {
        "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_attention_heads": 32,
        "num_hidden_layers": 48, **_QWEN3_MOE, "max_window_layers": 48,
    },
    "qwen3_235b_a22b": {
        "hidden_size": 4096, "intermediate_size": 12288, "moe_intermediate_size": 1536, "num_attention_heads": 64,
        "num_hidden_layers": 94, **_QWEN3_MOE, "max_window_layers": 94,
    },
    "llama3_2_1b": {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "bos_token_id": 128000, "head_dim": 64,
        "eos_token_id": 128001, "hidden_size": 2048, "intermediate_size": 8192, "max_position_embeddings": 131072,
        "mlp_bias": False, "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16,
        "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_theta": 500000.0,
        "rope_scaling": {
            "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3",
        },
        "tie_word_embeddings": True, "vocab_size": 128256,
    },
    "v2_lite": {
        "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "intermediate_size": 10944,
        "max_position_embeddings": 163840, "norm_topk_prob": False, "rms_norm_eps": 1e-06, "rope_theta": 10000,
        "routed_scaling_factor": 1.0, "scoring_func": "softmax", "topk_method": "greedy", "vocab_size": 102400,
        "bos_token_id": 100000, "eos_token_id": 100001, "aux_loss_alpha": 0.001, "seq_aux": True,
        "rope_scaling": {
            "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707,
            "original_max_position_embeddings": 4096, "type": "yarn",
        },
        **_LATENT,
    },
    "moonlight_16b": {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "intermediate_size": 11264,
        "max_position_embeddings": 8192, "norm_topk_prob": True, "rms_norm_eps": 1e-05, "rope_theta": 50000.0,
        "routed_scaling_factor": 2.446, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "vocab_size": 163840,
        "bos_token_id": 163584, "eos_token_id": 163585, "num_nextn_predict_layers": 0, **_LATENT,
    },
}  # fmt: skip
NOT_WRITTEN = {"max_window_layers", "sliding_window", "pretraining_tp"}
"""Keys that say nothing where they stand; of `fixed` ones Llama's degree is written all the same."""


def preset(name: str) -> ModelConfig:
    """The preset, extended as the release is."""
    model = load("pretrain", [f"model={name}"]).model
    if name == "v2_lite":
        return replace(model, rope=replace(model.rope, factor=40.0), max_sequence_length=163840)
    return model


def comparable(model: ModelConfig) -> ModelConfig:
    """Without what a config.json does not say: how a model is trained, and positions that nothing extends."""
    rope = RopeConfig(base=model.rope.base) if model.rope.factor == 1 else model.rope
    moe = replace(model.moe, bias_update_rate=0.0, sequence_loss_coefficient=0.0)
    moe = moe if moe.num_experts else MoeConfig.none()
    return replace(model, rope=rope, moe=moe, init_std=0.02, mtp=MtpConfig(num_layers=0))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config_is_the_preset(name: str, tmp_path: Path) -> None:
    published = _COMMON | PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(published))
    found = model_config_from_hf(tmp_path / "config.json")
    assert comparable(found) == comparable(preset(name))
    written = hf_config(found, SpecialTokens(published["bos_token_id"], published["eos_token_id"]))
    ours = {key: value for key, value in written.items() if key in published}
    theirs = {key: value for key, value in published.items() if key in written}
    if name == "llama3_2_1b":
        theirs["rope_scaling"] = published["rope_scaling"]
    assert ours == theirs
    assert published.keys() - written.keys() <= NOT_WRITTEN


DRAWN = {"deepseek-v3": sparse_shape(0), "deepseek-v2": sparse_shape(5)} | {
    kind: grouped_shape(kind, 2) for kind in GROUPED
}


@pytest.mark.parametrize("name", DRAWN)
def test_what_transformers_writes_is_read(name: str, tmp_path: Path) -> None:
    from transformers import AutoConfig

    model = replace(DRAWN[name], mtp=MtpConfig(num_layers=0))
    (tmp_path / "config.json").write_text(json.dumps(hf_config(model)))
    AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    assert comparable(model_config_from_hf(tmp_path / "again" / "config.json")) == comparable(model)


def test_a_model_has_one_family() -> None:
    for name, model in DRAWN.items():
        assert [family for family in FAMILIES if family.has(model)] == [family_of(model)]
        check_exportable(model)
        assert family_of(model).model_type == name.replace("-", "_")


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("qwen2_5_0_5b", "use_sliding_window", True),
        ("qwen2_5_0_5b", "num_key_value_heads", 3),
        ("qwen3_0_6b", "attention_bias", True),
        ("qwen3_0_6b", "rope_scaling", {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}),
        ("qwen3_30b_a3b", "mlp_only_layers", [0]),
        ("qwen3_30b_a3b", "decoder_sparse_step", 2),
        ("qwen3_30b_a3b", "num_experts_per_tok", 1),
        ("llama3_2_1b", "mlp_bias", True),
        ("llama3_2_1b", "hidden_act", "gelu"),
        ("v2_lite", "topk_method", "noaux_tc"),
        ("v2_lite", "norm_topk_prob", True),
        ("v2_lite", "scoring_func", "sigmoid"),
        ("moonlight_16b", "norm_topk_prob", False),
    ],
)
def test_config_that_would_be_computed_differently_is_refused(
    name: str, key: str, value: object, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(_COMMON | PUBLISHED[name] | {key: value}))
    with pytest.raises(DataError, match=r"config\.json: ") as error:
        model_config_from_hf(tmp_path / "config.json")
    assert "\n" not in str(error.value)


def test_heads_of_a_group_lie_together() -> None:
    """[q q k v] for each key-value head, as megatron-core splits them."""
    mapping = ParamMapping("native", ("q", "k", "v"), ((8, 1), (4, 1), (4, 1)), groups=2)
    parts = [torch.arange(8.0), 10 + torch.arange(4.0), 20 + torch.arange(4.0)]
    native = mapping.join([part[:, None] for part in parts])
    assert native[:, 0].tolist() == [0, 1, 2, 3, 10, 11, 20, 21, 4, 5, 6, 7, 12, 13, 22, 23]
    assert all(torch.equal(found[:, 0], part) for found, part in zip(mapping.split(native), parts, strict=True))
    assert mapping.native_shape == (16, 1)


def test_a_tied_head_is_not_stored_and_the_view_for_serving_changes_no_positions(tmp_path: Path) -> None:
    model = ModelConfig(
        tied_embeddings=True,
        attention=GroupedAttentionConfig(qkv_bias=True),
        moe=MoeConfig.none(),
        mtp=MtpConfig(num_layers=0),
    )
    assert not [mapping.native for mapping in param_mappings(model) if "lm_head.weight" in mapping.hf]
    tensors = {name: torch.zeros(shape) for name, shape in native_shapes(model).items()}
    folder = export(tensors.items(), model, tmp_path / "hf")
    view = json.loads((serving_view(folder, tmp_path / "view") / "config.json").read_text())
    assert view["rope_scaling"] is None and view["dtype"] == "float32"
