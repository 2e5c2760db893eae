"""Parameters and operations against DeepSeek-V3's published figures and against a built model."""

from __future__ import annotations

import pytest

from megatron_r1.config.model import AttentionConfig, MixtureConfig, ModelConfig
from megatron_r1.model.build import native_tensors
from megatron_r1.model.flops import activated_parameters, flops_per_token, peak_flops

DEEPSEEK_V3 = ModelConfig(
    num_layers=61,
    hidden_size=7168,
    num_attention_heads=128,
    ffn_hidden_size=18432,
    vocab_size=129280,
    max_sequence_length=4096,
    attention=AttentionConfig(
        q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128
    ),
    moe=MixtureConfig(
        num_experts=256, top_k=8, ffn_hidden_size=2048, num_groups=8, group_top_k=4, first_dense_layers=3
    ),
)


def test_activated_parameters_of_deepseek_v3():
    assert activated_parameters(DEEPSEEK_V3) == 36_625_603_584


@pytest.mark.parametrize(("causal", "percent"), [(True, 39.06), (False, 43.85)])
def test_utilisation_of_deepseek_v3_training(causal, percent):
    flops = 1543.2 * flops_per_token(DEEPSEEK_V3, 4096, causal=causal)
    assert 100 * flops / 989.5e12 == pytest.approx(percent, abs=0.005)


@pytest.mark.parametrize("shape", ["tiny", "direct_query"])
def test_activated_parameters_equal_those_of_a_built_model(shape, new_model):
    from layouts import model_of

    model = model_of(shape)
    visited = 0.0
    for name, tensor in native_tensors(new_model(model)):
        if not name.startswith(("mtp.", "embedding.")) and not name.endswith("expert_bias"):
            share = model.moe.top_k / model.moe.num_experts if ".mlp.experts." in name else 1
            visited += tensor.numel() * share
    assert activated_parameters(model) == visited


def test_the_peak_of_this_machine_is_measured():
    assert 1e8 < peak_flops("cpu") < 1e14
