"""A quantised linear layer's three products against the same recipe in float64, by loops over tokens and features."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron_r1.model.fp8.linear import LinearRecipe, multiply, parallel_multiply
from megatron_r1.model.fp8.quantise import BLOCK, E5M6, WHOLE

FORMATS = {"E4M3": (3, -6, 448.0), "E5M6": (6, -14, 65024.0)}
DEEPSEEK = LinearRecipe()
AFTER_ATTENTION = LinearRecipe(power_of_two_inputs=True, saved=E5M6)
RECIPES = {
    "as the report": DEEPSEEK,
    "after attention": AFTER_ATTENTION,
    "dispatched": LinearRecipe(power_of_two_inputs=True),
    "back to the experts": LinearRecipe(power_of_two_gradients=True),
    "gradients in blocks": LinearRecipe(gradients=BLOCK),
    "a scale a tensor": LinearRecipe(WHOLE, WHOLE, WHOLE),
}


def to_format(x: Tensor, name: str) -> Tensor:
    """float64 numbers to the format's nearest, ties to even."""
    bits, smallest, largest = FORMATS[name]
    exponent = torch.frexp(x)[1].sub(1).clamp(min=smallest).double()
    step = 2.0 ** (exponent - bits)
    return (torch.round(x / step) * step).clamp(-largest, largest)


def reference(x: Tensor, groups: list[tuple[slice, slice]], name: str, power_of_two: bool) -> Tensor:
    """Quantised and dequantised, a group that shares a scale at a time."""
    out = torch.empty_like(x)
    for group in groups:
        scale = (x[group].abs().max() / FORMATS[name][2]).float()
        if power_of_two:
            scale = torch.tensor(2.0) ** torch.log2(scale.double()).ceil()
        quotient = (x[group] / scale.double()).float().double()
        out[group] = (to_format(quotient, name) * scale.double()).float().double()
    return out


def along(x: Tensor, axis: int) -> list[tuple[slice, slice]]:
    """Runs of 128 along an axis, one row or column wide."""
    runs = [slice(i, i + 128) for i in range(0, x.shape[axis], 128)]
    single = [slice(i, i + 1) for i in range(x.shape[1 - axis])]
    return [(run, one) if axis == 0 else (one, run) for run in runs for one in single]


def blocks(x: Tensor) -> list[tuple[slice, slice]]:
    return [
        (slice(i, i + 128), slice(j, j + 128)) for i in range(0, x.shape[0], 128) for j in range(0, x.shape[1], 128)
    ]


def whole(x: Tensor) -> list[tuple[slice, slice]]:
    return [(slice(None), slice(None))]


@functools.cache
def products(name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Forward, input gradient, weight gradient of a recipe in float64; which axis a product sums over is spelt out."""
    x, w, dy = (each.double() for each in operands())
    recipe = RECIPES[name]
    tensor, gradients_in_blocks = name == "a scale a tensor", name == "gradients in blocks"
    inputs, gradients = recipe.power_of_two_inputs, recipe.power_of_two_gradients
    weight = reference(w, whole(w) if tensor else blocks(w), "E4M3", False)
    by_feature = reference(x, whole(x) if tensor else along(x, 1), "E4M3", inputs)
    saved_for_backward = by_feature
    if name == "after attention":
        saved_for_backward = reference(x, along(x, 1), "E5M6", inputs)
    by_token = reference(saved_for_backward, whole(x) if tensor else along(x, 0), "E4M3", inputs)
    special = whole(dy) if tensor else blocks(dy) if gradients_in_blocks else None
    dy_by_feature = reference(dy, special or along(dy, 1), "E4M3", gradients)
    dy_by_token = reference(dy, special or along(dy, 0), "E4M3", gradients)
    return by_feature @ weight.T, dy_by_feature @ weight, dy_by_token.T @ by_token


def operands(T: int = 150, K: int = 200, N: int = 260) -> tuple[Tensor, Tensor, Tensor]:
    """Rows and columns of very different sizes, so that it matters what shares a scale."""
    generator = torch.Generator().manual_seed(T)

    def draw(rows: int, columns: int) -> Tensor:
        sizes = [10.0 ** (torch.rand(n, generator=generator) * 3) for n in (rows, columns)]
        return torch.randn(rows, columns, generator=generator) * sizes[0][:, None] * sizes[1]

    return draw(T, K), draw(N, K), draw(T, N)


def three(x: Tensor, w: Tensor, dy: Tensor, recipe: LinearRecipe) -> tuple[Tensor, Tensor, Tensor]:
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    y = multiply(x, w, recipe)
    y.backward(dy)
    assert x.grad is not None and w.grad is not None
    return y.detach(), x.grad, w.grad


def distance(mine: Tensor, other: Tensor) -> float:
    return float((mine.double() - other.double()).norm() / other.double().norm())


@pytest.mark.parametrize("name", RECIPES)
def test_products_are_those_of_the_recipe_in_float64(name):
    x, w, dy = operands()
    found, expected = three(x, w, dy, RECIPES[name]), products(name)
    for mine, theirs in zip(found, expected, strict=True):
        # What is left is fp32 summation over at most 260 products.
        assert distance(mine, theirs) < 1e-6
    others = {other: products(other) for other in RECIPES if other != name}
    for other, values in others.items():
        assert max(distance(mine, theirs) for mine, theirs in zip(found, values, strict=True)) > 1e-3, other


def test_errors_against_unquantised_products_are_those_of_eight_bits():
    x, w, dy = operands()
    exact = x.double() @ w.double().T, dy.double() @ w.double(), dy.double().T @ x.double()
    for mine, theirs in zip(three(x, w, dy, DEEPSEEK), exact, strict=True):
        assert 0.01 < distance(mine, theirs) < 0.06


def test_leading_dimensions_are_tokens_in_order():
    x, w, _ = operands(T=150)
    folded = multiply(x.view(5, 30, 200), w, DEEPSEEK)
    assert folded.shape == (5, 30, 260) and torch.equal(folded.flatten(0, 1), multiply(x, w, DEEPSEEK))


def test_bf16_operands_are_quantised_as_they_are_and_results_are_bf16():
    x, w, dy = (each.bfloat16() for each in operands())
    found = three(x, w, dy, DEEPSEEK)
    wide = three(x.float(), w.float(), dy.float(), DEEPSEEK)
    for mine, theirs in zip(found, wide, strict=True):
        assert mine.dtype == torch.bfloat16 and torch.equal(mine, theirs.bfloat16())


def test_no_tokens_give_no_output_and_a_zero_gradient():
    w = torch.randn(4, 130, requires_grad=True)
    multiply(torch.empty(0, 130), w, DEEPSEEK).sum().backward()
    assert w.grad is not None and torch.equal(w.grad, torch.zeros(4, 130))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_shows_in_output_and_gradient(bad):
    x, w, dy = operands()
    x[3, 7] = bad
    y, dx, dw = three(x, w, dy, DEEPSEEK)
    assert y[3].isnan().all() and not y[:3].isnan().any()
    assert dw[:, 7].isnan().all() and not dx.isnan().any()


def test_a_frozen_weight_gets_no_gradient_and_passes_one_on():
    x, w, dy = operands()
    expected = three(x, w, dy, DEEPSEEK)[1]
    x.requires_grad_()
    multiply(x, w, DEEPSEEK).backward(dy)
    assert torch.equal(x.grad, expected) and w.grad is None


def test_what_a_cpu_cannot_do_is_refused():
    x, w, _ = operands()
    product = parallel_multiply(DEEPSEEK)
    with pytest.raises(ValueError, match="neither fuse nor defer"):
        product(x, w, None, True, False, False, None)
    with pytest.raises(ValueError, match="neither fuse nor defer"):
        product(x, w, None, False, False, False, None, grad_output_buffer=[])
    assert torch.equal(product(x, w, None, False, False, False, None), multiply(x, w, DEEPSEEK))


def test_recipes_say_what_they_are():
    assert str(DEEPSEEK) == "inputs 1x128; weights 128x128; gradients 1x128"
    assert str(replace(AFTER_ATTENTION, gradients=WHOLE)) == (
        "inputs 1x128, powers of two (kept in E5M6); weights 128x128; gradients tensor"
    )
