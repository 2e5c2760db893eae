"""The precision section: DeepSeek's recipe by name, and what is refused."""

from __future__ import annotations

import pytest

from megatron_r1.config.cross_checks import check_layout
from megatron_r1.config.fp8 import LINEARS, Fp8Config
from megatron_r1.config.load import load
from megatron_r1.config.schema import convert
from megatron_r1.errors import ConfigError


def test_the_recipe_by_name_differs_from_full_precision_in_one_key():
    full, fp8 = (load("pretrain", [f"fp8={name}"]).fp8 for name in ("off", "deepseek"))
    assert (full.enabled, fp8.enabled) == (False, True)
    fp8.enabled = False
    assert full == fp8 == Fp8Config()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("enabled", "e5m2", "enabled=e5m2: must be true or false"),
        ("gradient_tiling", "128x1", "gradient_tiling=128x1: must be one of 1x128, 128x128, tensor"),
        ("activation_tiling", "1x64", "activation_tiling=1x64: must be one of 1x128, 128x128, tensor"),
        ("weight_tiling", "1x128", "weight_tiling=1x128: must be one of 128x128, tensor"),
        ("exclude_modules", ["eh_pro"], "exclude_modules=eh_pro: each must be one of self_attention.linear_q_proj, "),
        ("exclude_modules", ["output_layer"], "exclude_modules=output_layer: each must be one of "),
        ("power_of_two_inputs", ["eh_proj"], "power_of_two_inputs=eh_proj: is in exclude_modules"),
        ("e5m6_inputs", ["linear_proj"], "e5m6_inputs=linear_proj: each must be one of "),
    ],
)
def test_what_is_no_recipe_is_refused(key, value, message):
    with pytest.raises(ConfigError) as refused:
        convert(Fp8Config, {key: value})
    assert str(refused.value).startswith(message)


def test_a_recipe_that_quantises_nothing_is_refused():
    nothing: dict[str, list[str]] = {"power_of_two_inputs": [], "power_of_two_gradients": [], "e5m6_inputs": []}
    with pytest.raises(ConfigError, match="exclude_modules=14: names every linear layer"):
        convert(Fp8Config, {"exclude_modules": list(LINEARS), **nothing})


@pytest.mark.parametrize(
    ("verb", "overrides", "message"),
    [
        ("pretrain", ["train.sequence_length=120"], "train.sequence_length=120: must be a multiple of 16 x tensor x"),
        ("sft", ["train.sequence_length=144", "parallel.tensor=2"], "train.sequence_length=144: must be a multiple"),
        ("pretrain", ["train.sequence_length=144", "parallel.context=2"], "train.sequence_length=144: must be a "),
        ("dpo", ["fp8.gradient_tiling=128x128"], "fp8.gradient_tiling=128x128: must be 1x128 with Transformer Engine"),
    ],
)
def test_what_transformer_engine_does_not_multiply_is_refused_before_a_gpu_is_requested(verb, overrides, message):
    accepted = ["fp8=deepseek", "model.dtype=bf16", "train.sequence_length=128", "train.micro_batch_size=8"]
    for platform, enabled in (("cuda", "true"), ("cuda", "false"), ("cpu", "true")):
        config = [f"platform={platform}", *accepted, f"fp8.enabled={enabled}"]
        check_layout(load(verb, config), verb, 2)
        if (platform, enabled) == ("cuda", "true"):
            with pytest.raises(ConfigError) as refused:
                check_layout(load(verb, [*config, *overrides]), verb, 2)
            assert str(refused.value).startswith(message)
        else:
            check_layout(load(verb, [*config, *overrides]), verb, 2)


def test_sequences_that_are_padded_may_have_any_length():
    for verb in ("dpo", "reward_model"):
        check_layout(load(verb, ["platform=cuda", "fp8=deepseek", "train.sequence_length=121"]), verb, 1)
