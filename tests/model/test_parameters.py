"""Parameter counts of the presets, to the last digit: published ones, the table of names, and built models."""

from __future__ import annotations

from math import prod

import pytest

from megatron_r1.config.load import load
from megatron_r1.config.model import ModelConfig
from megatron_r1.config.recipes import configs_folder, groups
from megatron_r1.hf.param_mapping import Shape
from megatron_r1.model.build import native_tensors
from megatron_r1.model.parameters import activated_parameters
from tests.support.layouts import model_of
from tests.support.whole_models import expected_shapes, native_shapes

PUBLISHED = {
    "v3_671b": 671_026_419_200,
    "v2_236b": 235_741_434_880,
    "v2_lite": 15_706_484_224,
    "moonlight_16b": 15_960_110_208,
    "qwen2_5_0_5b": 494_032_768,
    "qwen2_5_1_5b": 1_543_714_304,
    "qwen2_5_7b": 7_615_616_512,
    "qwen2_5_14b": 14_770_033_664,
    "qwen2_5_32b": 32_763_876_352,
    "qwen3_0_6b": 596_049_920,
    "qwen3_30b_a3b": 30_532_122_624,
    "qwen3_235b_a22b": 235_093_634_560,
    "llama3_2_1b": 1_235_814_400,
    "llama3_1_8b": 8_030_261_248,
    "llama3_3_70b": 70_553_706_496,
}
OWN = {
    "v3_proxy": 3_603_930_128,
    "small": 72_224_368,
    "tiny": 1_102_360,
    "tiny_dense": 854_144,
    "tiny_llama": 918_656,
    "tiny_qwen3_moe": 1_119_616,
}


def preset(name: str) -> ModelConfig:
    return load("pretrain", [f"model={name}"]).model


def count(shapes: dict[str, Shape]) -> int:
    """Numbers in tensors of these shapes."""
    return sum(map(prod, shapes.values()))


def multi_token_parameters(model: ModelConfig) -> int:
    """Weights that only multi-token prediction has."""
    return count(native_shapes(model)) - count(native_shapes(model, include_mtp=False))


@pytest.mark.parametrize("name", groups()["model"])
def test_total_of_a_preset(name):
    model = preset(name)
    total = count(expected_shapes(model, include_mtp=False))
    assert total == count(native_shapes(model, include_mtp=False)) == (PUBLISHED | OWN)[name]
    comment = (configs_folder() / "model" / f"{name}.yaml").read_text()
    assert name in OWN or f"{total:,} parameters" in comment


def test_deepseek_v3_in_parts():
    model = preset("v3_671b")
    assert count(expected_shapes(model)) == 684_489_845_504  # "685B"
    assert activated_parameters(model, include_embedding=True) == 37_552_282_624  # "37B"
    assert activated_parameters(model) == 36_625_603_584  # "36.6B"
    assert multi_token_parameters(model) == 11_610_068_224
    joining = 2 * model.hidden_size**2
    assert multi_token_parameters(model) - joining == 11_507_307_776  # "11.5B"


@pytest.mark.parametrize(("name", "activated"), [("v2_236b", 21e9), ("v2_lite", 2.4e9), ("moonlight_16b", 2.24e9)])
def test_activated_parameters_are_near_the_rounded_published_ones(name, activated):
    """What the papers count is not said: with the head or without; the exact figure lies between."""
    model = preset(name)
    head = model.vocab_size * model.hidden_size
    assert activated_parameters(model) - head < activated * 1.02
    assert activated_parameters(model, include_embedding=True) > activated * 0.98


@pytest.mark.parametrize("shape", ["tiny", "direct_query", "grouped_bias", "grouped_norm", "grouped_experts"])
def test_built_model_has_as_many(shape, new_model):
    model, visited, total, extra = model_of(shape), 0.0, 0, 0
    for name, tensor in native_tensors(new_model(model)):
        if name.startswith("mtp."):
            extra += tensor.numel()
            continue
        total += tensor.numel()
        embedding = name.startswith("embedding.") and not model.tied_embeddings
        if not embedding and not name.endswith("expert_bias"):
            share = model.moe.top_k / model.moe.num_experts if ".mlp.experts." in name else 1
            visited += tensor.numel() * share
    assert (count(native_shapes(model, include_mtp=False)), multi_token_parameters(model)) == (total, extra)
    assert activated_parameters(model) == visited


@pytest.mark.parametrize("name", ["small", "tiny", "tiny_dense", "tiny_qwen3_moe"])
def test_built_preset_has_the_native_tensors_of_the_table(name, new_model):
    model = preset(name)
    assert {name: tuple(tensor.shape) for name, tensor in native_tensors(new_model(model))} == native_shapes(model)
