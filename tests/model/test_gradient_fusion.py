"""Apex's kernel for weight gradients, wired through the project's own update; the kernel is played in torch."""

from __future__ import annotations

import types
from dataclasses import replace

import pytest
import torch
from megatron.core.tensor_parallel import layers

from megatron_r1.config.parallel import ParallelConfig
from megatron_r1.config.performance import PerformanceConfig
from megatron_r1.model.build import build_model
from megatron_r1.train.stream import next_token_forward
from tests.support.gradients import gradients_of
from tests.support.layouts import model_of

ROWS_BL = torch.randint(0, 512, (4, 33), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def products(monkeypatch):
    """Weights whose gradients the kernel has added, by their shapes."""
    products: list[tuple[int, ...]] = []

    def wgrad_gemm_accum_fp32(x_TK, gradient_TN, main_grad_NK):
        products.append(tuple(main_grad_NK.shape))
        main_grad_NK.addmm_(gradient_TN.t().float(), x_TK.float())

    apex = types.SimpleNamespace(wgrad_gemm_accum_fp32=wgrad_gemm_accum_fp32)
    monkeypatch.setattr(layers, "fused_weight_gradient_mlp_cuda", apex, raising=False)
    monkeypatch.setattr(layers, "_grad_accum_fusion_available", True)
    return products


@pytest.mark.parametrize("name", ["tiny", "tiny_dense"])
def test_fused_weight_gradients_are_those_of_autograd(one_rank, products, name):
    """Also where multi-token prediction uses the head without that kernel, and where the head is the embedding."""
    gradients, losses, shape = {}, {}, replace(model_of(name), num_layers=2)
    for fusion in (False, True):
        performance = PerformanceConfig(gradient_accumulation_fusion=fusion)
        model = build_model(shape, ParallelConfig(), one_rank, 0, performance)
        reader = types.SimpleNamespace(forward=next_token_forward)
        gradients[fusion], losses[fusion] = gradients_of(model, ROWS_BL.split(2), reader)
        assert bool(products) == fusion
    assert losses[True] == losses[False]
    assert (512, model.config.hidden_size) in products, "the output layer's, which Transformer Engine does not add"
    for name, gradient in gradients[False].items():
        torch.testing.assert_close(gradients[True][name], gradient, rtol=1e-5, atol=1e-6)
