"""The softmax temperature and the rotary frequencies of each context stage, on models that are built."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from megatron_r1.config.load import load
from megatron_r1.config.model import ModelConfig, MoeConfig, MtpConfig, RopeConfig

TEMPERATURE_OF_40 = 0.1 * math.log(40) + 1


def built(new_model, model: ModelConfig):
    """The model with its own head widths and rotary positions, small in everything else."""
    moe = MoeConfig(num_experts=2, top_k=2, num_groups=1, group_top_k=1, ffn_hidden_size=8)
    sizes = {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "ffn_hidden_size": 16, "vocab_size": 32}
    small = replace(model, **sizes, dtype="fp32", moe=moe, mtp=MtpConfig(num_layers=1))
    return new_model(small)


@pytest.mark.parametrize(
    ("recipe", "overrides", "scale"),
    [
        ("pretrain", ["model=v3_671b"], 0.0721688),
        ("pretrain", ["model=v2_lite"], 0.0721688),
        ("context_32k", [], 0.1352338),
        ("context_128k", [], 0.1352338),
        ("context_tiny", [], (0.1 * math.log(4) + 1) ** 2 / math.sqrt(48)),
    ],
)
def test_softmax_scale_of_each_stage(new_model, recipe, overrides, scale):
    model = built(new_model, load("pretrain", overrides, recipe).model)
    attentions = [layer.self_attention for layer in model.decoder.layers]
    attentions.append(model.mtp.layers[0].mtp_model_layer.self_attention)
    for attention in attentions:
        assert attention.core_attention.softmax_scale == pytest.approx(scale, abs=5e-8)
    assert pytest.approx(1.3688879, abs=5e-8) == TEMPERATURE_OF_40


def test_a_temperature_of_the_rotary_part_alone_leaves_the_softmax(new_model):
    """mscale_all_dim=0: the same temperature, on cosine and sine instead."""
    model = replace(load("pretrain", ["model=v3_671b"]).model, rope=RopeConfig(factor=40.0, mscale_all_dim=0.0))
    attention = built(new_model, model).decoder.layers[0].self_attention
    assert attention.core_attention.softmax_scale == pytest.approx(192**-0.5)
    assert attention.rotary_pos_emb(8)[1] == pytest.approx(TEMPERATURE_OF_40)


def test_yarn_keeps_fast_frequencies_and_divides_slow_ones(new_model):
    """Dimension 64, base 10000, 4096 positions: pairs up to 10 stay, from 23 on they are divided by 40."""
    attention = built(new_model, load("pretrain", [], "context_128k").model).decoder.layers[0].self_attention
    frequencies = attention.rotary_pos_emb(2)[0][1, 0, 0, :32]
    plain = 10000.0 ** (-torch.arange(0, 64, 2) / 64)
    torch.testing.assert_close(frequencies[:11], plain[:11])
    torch.testing.assert_close(frequencies[23:], plain[23:] / 40)
    between = frequencies[11:23] / plain[11:23]
    assert bool((between < 1).all() and (between > 1 / 40).all() and (between.diff() < 0).all())
