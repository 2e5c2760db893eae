"""config.json: read back by us and by transformers, refused where DeepSeek-V3 has no such model; the serving view."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_r1.config.model import AttentionConfig, ModelConfig, MoeConfig, MtpConfig, RopeConfig
from megatron_r1.errors import ConfigError, DataError
from megatron_r1.files import read_json
from megatron_r1.hf.config import SpecialTokens, hf_config, serving_view
from megatron_r1.hf.model_config import model_config_from_hf
from tests.support.whole_models import export, load_tensors

RandomTensors = Callable[[ModelConfig], dict[str, Tensor]]

RELEASED = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 129280,
}
"""The released configuration of DeepSeek-V3, without its float8 and remote-code entries."""


def test_released_config_there_and_back(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(RELEASED))
    model = model_config_from_hf(tmp_path / "config.json")
    assert model.dtype == "bf16"
    assert hf_config(model, SpecialTokens(0, 1)) == RELEASED | {"pad_token_id": None}


def test_model_config_there_and_back(model: ModelConfig, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(hf_config(model)))
    assert model_config_from_hf(tmp_path / "config.json") == model


def test_config_that_transformers_writes_is_read(model: ModelConfig, oracle_folder: Path) -> None:
    assert "rope_parameters" in json.loads((oracle_folder / "config.json").read_text())
    assert model_config_from_hf(oracle_folder / "config.json") == model


def test_transformers_reads_the_rotary_settings(model: ModelConfig, oracle: torch.nn.Module) -> None:
    rope = oracle.config.rope_parameters
    assert rope["rope_theta"] == model.rope.base
    assert rope["rope_type"] == ("yarn" if model.rope.factor > 1 else "default")
    assert oracle.config.q_lora_rank == (model.attention.q_lora_rank or None)
    assert oracle.config.initializer_range == model.init_std


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "gpt2"),
        ("scoring_func", "softmax"),
        ("tie_word_embeddings", True),
        ("quantization_config", {"quant_method": "fp8"}),
        ("num_key_value_heads", 8),
        ("torch_dtype", "float16"),
        ("topk_group", 9),
        ("hidden_size", None),
        ("rope_scaling", {"type": "linear", "factor": 2}),
        ("rope_scaling", {"type": "yarn", "factor": 2}),
    ],
)
def test_config_of_another_model_is_refused(key: str, value: object, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(RELEASED | {key: value}))
    with pytest.raises(DataError, match=r"config\.json: ") as error:
        model_config_from_hf(tmp_path / "config.json")
    assert "\n" not in str(error.value)


def test_config_that_is_missing_or_incomplete_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with pytest.raises(DataError, match="No such file"):
        model_config_from_hf(path)
    path.write_text("{")
    with pytest.raises(DataError, match="is no JSON"):
        model_config_from_hf(path)
    path.write_text(json.dumps({key: value for key, value in RELEASED.items() if key != "v_head_dim"}))
    with pytest.raises(DataError, match="v_head_dim is missing"):
        model_config_from_hf(path)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"moe": MoeConfig(num_experts=8, top_k=8, num_groups=8, group_top_k=8)}, "moe.num_groups=8"),
        ({"moe": MoeConfig(top_k=1)}, "moe.top_k=1"),
        (
            {
                "moe": MoeConfig(score_function="softmax", num_shared_experts=0),
            },
            "moe.num_shared_experts=0",
        ),
        ({"attention": AttentionConfig(norm_epsilon=1e-5)}, "attention.norm_epsilon=1e-05"),
        ({"rope": RopeConfig(factor=4.0, mscale=0.707, mscale_all_dim=0.0)}, "rope.mscale=0.707"),
    ],
)
def test_what_deepseek_code_computes_differently_is_not_exported(changes: dict, key: str) -> None:
    with pytest.raises(ConfigError) as error:
        hf_config(ModelConfig(mtp=MtpConfig(num_layers=0), **changes))
    assert str(error.value).startswith(f"model.{key}: ") and "\n" not in str(error.value)


def test_serving_view_computes_the_same_model(
    one_model: ModelConfig, random_tensors: RandomTensors, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    folder = export(random_tensors(one_model).items(), one_model, tmp_path / "hf", include_mtp=False)
    before = (folder / "config.json").read_bytes()
    view = serving_view(folder, tmp_path / "view")
    assert (folder / "config.json").read_bytes() == before
    assert (view / "model.safetensors").resolve() == (folder / "model.safetensors").resolve()
    config = json.loads((view / "config.json").read_text())
    assert (config["rope_scaling"]["type"], config["rope_scaling"]["factor"]) == ("yarn", 1.0)
    assert config["rope_scaling"]["original_max_position_embeddings"] == one_model.max_sequence_length
    assert (config["num_nextn_predict_layers"], config["dtype"]) == (0, "float32")
    assert list(load_tensors(view, one_model, include_mtp=False))

    plain, viewed = (AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval() for path in (folder, view))
    assert viewed.config.rope_parameters["rope_type"] == "yarn"
    assert viewed.model.layers[0].self_attn.scaling == plain.model.layers[0].self_attn.scaling
    tokens = torch.randint(0, one_model.vocab_size, (2, 60), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        torch.testing.assert_close(viewed(tokens).logits, plain(tokens).logits, rtol=0, atol=2e-5)


def test_serving_view_keeps_yarn_and_can_be_renewed(random_tensors: RandomTensors, tmp_path: Path) -> None:
    model = ModelConfig(
        num_layers=2,
        attention=AttentionConfig(q_lora_rank=0),
        moe=MoeConfig(num_experts=2, num_groups=1, group_top_k=1),
        rope=RopeConfig(factor=4.0, original_max_position=64),
    )
    folder = export(random_tensors(model).items(), model, tmp_path / "hf")
    for _ in range(2):
        view = serving_view(folder, tmp_path / "view")
    scaling = json.loads((view / "config.json").read_text())["rope_scaling"]
    assert scaling == hf_config(model)["rope_scaling"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "view"]


def test_the_byte_order_mark_of_a_config_is_no_part_of_it(tmp_path):
    (tmp_path / "config.json").write_bytes(b"\xef\xbb\xbf" + b'{"a": 1}')
    assert read_json(tmp_path / "config.json") == {"a": 1}
