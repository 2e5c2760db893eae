"""Operations against DeepSeek-V3's published utilisation, and a dense model's by hand."""

from __future__ import annotations

import pytest
import torch

from megatron_r1.config.load import load
from megatron_r1.config.model import ModelConfig
from megatron_r1.model.flops import flops_per_token, peak_flops

SPEED, PEAK = 1543.2, 989.5e12
"""Tokens/s and dense bf16 FLOP/s of an H800."""


def preset(name: str) -> ModelConfig:
    return load("pretrain", [f"model={name}"]).model


def test_utilisation_of_deepseek_v3_training():
    flops = flops_per_token(preset("v3_671b"), 4096)
    assert 100 * SPEED * flops / PEAK == pytest.approx(39.06, abs=0.005)


def test_dense_model_written_out():
    """6 per weight that a token is multiplied with; 12 L S per head channel of the scores and of their values."""
    weights, attention = 1_235_814_400, 12 * 16 * 4096 * 32 * 64
    assert flops_per_token(preset("llama3_2_1b"), 4096) == 6 * weights + attention // 2


def test_the_peak_of_this_machine_is_measured():
    before = torch.get_rng_state()
    assert 1e8 < peak_flops("cpu") < 1e14
    assert torch.equal(torch.get_rng_state(), before), "a run that resumes has restored its random state before"
