"""The table of names: against DeepSeek-V3's published sizes and against a list written out by hand."""

from __future__ import annotations

from math import prod

from megatron_r1.config.model import AttentionConfig, ModelConfig, MoeConfig
from megatron_r1.hf.families import canonical_name, param_mappings
from tests.support.whole_models import expected_shapes, native_shapes


def deepseek_v3() -> ModelConfig:
    return ModelConfig(
        num_layers=61,
        hidden_size=7168,
        num_attention_heads=128,
        ffn_hidden_size=18432,
        vocab_size=129280,
        max_sequence_length=163840,
        attention=AttentionConfig(
            q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128
        ),
        moe=MoeConfig(
            num_experts=256, top_k=8, ffn_hidden_size=2048, num_groups=8, group_top_k=4, first_dense_layers=3
        ),
    )


def test_released_model_has_the_published_number_of_weights() -> None:
    released = expected_shapes(deepseek_v3())
    assert sum(map(prod, released.values())) == 684_489_845_504
    main = expected_shapes(deepseek_v3(), include_mtp=False)
    assert sum(map(prod, main.values())) == 671_026_419_200  # 671,026,404,352 and 58 biases of 256
    assert sum(map(prod, native_shapes(deepseek_v3()).values())) == 684_489_845_504 - 2 * 129280 * 7168


def test_released_model_has_the_published_number_of_tensors() -> None:
    """91,991 tensors in the release, of which each two-dimensional float8 weight has a second one for its scales."""
    released = expected_shapes(deepseek_v3())
    kept = ("embed_tokens.weight", "head.weight", "mlp.gate.weight", "eh_proj.weight")
    quantised = [name for name, shape in released.items() if len(shape) == 2 and not name.endswith(kept)]
    assert len(released) + len(quantised) == 91_991


def test_released_shapes() -> None:
    released = expected_shapes(deepseek_v3())
    assert released["model.layers.0.self_attn.q_b_proj.weight"] == (24576, 1536)
    assert released["model.layers.60.self_attn.kv_a_proj_with_mqa.weight"] == (576, 7168)
    assert released["model.layers.60.self_attn.kv_b_proj.weight"] == (32768, 512)
    assert released["model.layers.60.self_attn.o_proj.weight"] == (7168, 16384)
    assert released["model.layers.2.mlp.down_proj.weight"] == (7168, 18432)
    assert released["model.layers.3.mlp.experts.255.gate_proj.weight"] == (2048, 7168)
    assert released["model.layers.61.eh_proj.weight"] == (7168, 14336)
    assert released["model.layers.61.shared_head.head.weight"] == (129280, 7168)


def test_names_are_unique_both_ways(model: ModelConfig) -> None:
    table = param_mappings(model)
    hf_names = [name for mapping in table for name in mapping.hf + mapping.copies]
    assert len(set(hf_names)) == len(hf_names)
    assert len({mapping.native for mapping in table}) == len(table)


NATIVE_BY_HAND = """
embedding.word_embeddings.weight 512 128
decoder.layers.0.input_layernorm.weight 128
decoder.layers.0.self_attention.linear_q_down_proj.weight 64 128
decoder.layers.0.self_attention.linear_q_up_proj.layer_norm_weight 64
decoder.layers.0.self_attention.linear_q_up_proj.weight 192 64
decoder.layers.0.self_attention.linear_kv_down_proj.weight 48 128
decoder.layers.0.self_attention.linear_kv_up_proj.layer_norm_weight 32
decoder.layers.0.self_attention.linear_kv_up_proj.weight 256 32
decoder.layers.0.self_attention.linear_proj.weight 128 128
decoder.layers.0.mlp.linear_fc1.layer_norm_weight 128
decoder.layers.0.mlp.linear_fc1.weight 512 128
decoder.layers.0.mlp.linear_fc2.weight 128 256
decoder.layers.1.input_layernorm.weight 128
decoder.layers.1.self_attention.linear_q_down_proj.weight 64 128
decoder.layers.1.self_attention.linear_q_up_proj.layer_norm_weight 64
decoder.layers.1.self_attention.linear_q_up_proj.weight 192 64
decoder.layers.1.self_attention.linear_kv_down_proj.weight 48 128
decoder.layers.1.self_attention.linear_kv_up_proj.layer_norm_weight 32
decoder.layers.1.self_attention.linear_kv_up_proj.weight 256 32
decoder.layers.1.self_attention.linear_proj.weight 128 128
decoder.layers.1.pre_mlp_layernorm.weight 128
decoder.layers.1.mlp.router.weight 2 128
decoder.layers.1.mlp.router.expert_bias 2
decoder.layers.1.mlp.experts.linear_fc1.weight0 128 128
decoder.layers.1.mlp.experts.linear_fc2.weight0 128 64
decoder.layers.1.mlp.experts.linear_fc1.weight1 128 128
decoder.layers.1.mlp.experts.linear_fc2.weight1 128 64
decoder.layers.1.mlp.shared_experts.linear_fc1.weight 128 128
decoder.layers.1.mlp.shared_experts.linear_fc2.weight 128 64
decoder.final_layernorm.weight 128
output_layer.weight 512 128
mtp.layers.0.enorm.weight 128
mtp.layers.0.hnorm.weight 128
mtp.layers.0.eh_proj.weight 128 256
mtp.layers.0.mtp_model_layer.input_layernorm.weight 128
mtp.layers.0.mtp_model_layer.self_attention.linear_q_down_proj.weight 64 128
mtp.layers.0.mtp_model_layer.self_attention.linear_q_up_proj.layer_norm_weight 64
mtp.layers.0.mtp_model_layer.self_attention.linear_q_up_proj.weight 192 64
mtp.layers.0.mtp_model_layer.self_attention.linear_kv_down_proj.weight 48 128
mtp.layers.0.mtp_model_layer.self_attention.linear_kv_up_proj.layer_norm_weight 32
mtp.layers.0.mtp_model_layer.self_attention.linear_kv_up_proj.weight 256 32
mtp.layers.0.mtp_model_layer.self_attention.linear_proj.weight 128 128
mtp.layers.0.mtp_model_layer.pre_mlp_layernorm.weight 128
mtp.layers.0.mtp_model_layer.mlp.router.weight 2 128
mtp.layers.0.mtp_model_layer.mlp.router.expert_bias 2
mtp.layers.0.mtp_model_layer.mlp.experts.linear_fc1.weight0 128 128
mtp.layers.0.mtp_model_layer.mlp.experts.linear_fc2.weight0 128 64
mtp.layers.0.mtp_model_layer.mlp.experts.linear_fc1.weight1 128 128
mtp.layers.0.mtp_model_layer.mlp.experts.linear_fc2.weight1 128 64
mtp.layers.0.mtp_model_layer.mlp.shared_experts.linear_fc1.weight 128 128
mtp.layers.0.mtp_model_layer.mlp.shared_experts.linear_fc2.weight 128 64
mtp.layers.0.final_layernorm.weight 128
"""


def test_native_names_are_transformer_engines() -> None:
    moe = MoeConfig(num_experts=2, top_k=2, num_groups=1, group_top_k=1)
    by_hand = (line.split() for line in NATIVE_BY_HAND.strip().splitlines())
    assert native_shapes(ModelConfig(num_layers=2, moe=moe)) == {
        name: tuple(map(int, shape)) for name, *shape in by_hand
    }


def test_old_name_of_the_multi_token_layer() -> None:
    old = "mtp.layers.1.transformer_layer.mlp.router.weight"
    assert canonical_name(old) == "mtp.layers.1.mtp_model_layer.mlp.router.weight"
    assert canonical_name("decoder.layers.1.mlp.router.weight") == "decoder.layers.1.mlp.router.weight"
