"""A linear layer's three products with quantised operands, computed exactly: quantise, dequantise, multiply.

Forward y = x W', input gradient dx = dy W, weight gradient dW = dy' x. Each operand is tiled along the dimension that
its product sums over (DeepSeek-V3 report, section 3.3.2 and appendix B.2): x by 128 channels in the forward product and
by 128 tokens in the weight gradient, dy by 128 channels in the input gradient and by 128 tokens in the weight gradient.
For the backward pass x is kept quantised, so its second tiling starts from the first one's values (section 3.3.3).

Results have the types of the input and of the weight, as they have without quantisation. Sums are in fp32, of float64
models in float64.

Shapes: T tokens, K input features, N output features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from megatron_r1.model.fp8.quantise import BLOCK, E4M3, TILE, Format, Tiling, through


@dataclass(frozen=True)
class LinearRecipe:
    """How one linear layer's operands are quantised."""

    activations: Tiling = TILE
    gradients: Tiling = TILE
    weights: Tiling = BLOCK
    power_of_two_inputs: bool = False
    power_of_two_gradients: bool = False
    saved: Format = E4M3
    """Format in which the input is saved for the backward pass."""

    def __str__(self) -> str:
        def tiling(of: Tiling, power_of_two: bool) -> str:
            return ("x".join(map(str, of)) if all(of) else "tensor") + (", powers of two" if power_of_two else "")

        saved = "" if self.saved == E4M3 else f" (kept in {self.saved.name})"
        return (
            f"inputs {tiling(self.activations, self.power_of_two_inputs)}{saved}; "
            f"weights {tiling(self.weights, False)}; "
            f"gradients {tiling(self.gradients, self.power_of_two_gradients)}"
        )


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TK: Tensor, weight_NK: Tensor, recipe: LinearRecipe) -> Tensor:
        inputs_TK = through(x_TK, recipe.activations, E4M3, recipe.power_of_two_inputs)
        saved_TK = inputs_TK
        if recipe.saved != E4M3:
            saved_TK = through(x_TK, recipe.activations, recipe.saved, recipe.power_of_two_inputs)
        weights_NK = through(weight_NK, recipe.weights)
        ctx.save_for_backward(saved_TK, weights_NK)
        ctx.recipe, ctx.types = recipe, (x_TK.dtype, weight_NK.dtype)
        return _product(inputs_TK, weights_NK.t(), x_TK.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (dy_TN,), recipe = gradients, ctx.recipe
        saved_TK, weights_NK = ctx.saved_tensors
        dx_TK = dw_NK = None
        if ctx.needs_input_grad[0]:
            by_channel_TN = through(dy_TN, recipe.gradients, E4M3, recipe.power_of_two_gradients)
            dx_TK = _product(by_channel_TN, weights_NK, ctx.types[0])
        if ctx.needs_input_grad[1]:
            by_token_TN = through(dy_TN, recipe.gradients.turned(), E4M3, recipe.power_of_two_gradients)
            retiled_TK = through(saved_TK, recipe.activations.turned(), E4M3, recipe.power_of_two_inputs)
            dw_NK = _product(by_token_TN.t(), retiled_TK, ctx.types[1])
        return dx_TK, dw_NK, None


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """A product of fp32 matrices in `dtype`; it is summed in fp32, for float64 in float64."""
    sums = torch.promote_types(dtype, torch.float32)
    return (left.to(sums) @ right.to(sums)).to(dtype)


def multiply(x: Tensor, weight_NK: Tensor, recipe: LinearRecipe) -> Tensor:
    """x W' of a quantised linear layer, differentiable.

    Args:
        x: [..., K]; leading dimensions are tokens, in order.
        weight_NK: weight of this rank.
        recipe: tilings and scales.

    Returns:
        [..., N], of the type of x.
    """
    product_TN: Tensor = _Products.apply(x.flatten(0, -2), weight_NK, recipe)
    return torch.unflatten(product_TN, 0, x.shape[:-1])


def parallel_multiply(recipe: LinearRecipe) -> Callable[..., Tensor]:
    """What megatron-core's column- and row-parallel linear layers call for their product, quantised.

    As in the function that it stands for, the input is gathered over sequence-parallel ranks and its gradient
    scattered back, or its gradient is summed over tensor-parallel ranks. Each rank tiles what it multiplies: its own
    shard of the weight, and all tokens of the gathered input.
    """

    def forward(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gradient_accumulation_fusion: bool,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        tp_group: Any,
        grad_output_buffer: list[Tensor] | None = None,
        wgrad_deferral_limit: int | None = None,
        gtp_remat_size: int = 1,
    ) -> Tensor:
        if gradient_accumulation_fusion or grad_output_buffer is not None or gtp_remat_size > 1:
            raise ValueError("quantised products on a CPU neither fuse nor defer weight gradients, nor shard by tokens")
        if sequence_parallel:
            input = gather_from_sequence_parallel_region(input, tensor_parallel_output_grad=True, group=tp_group)
        elif allreduce_dgrad:
            input = copy_to_tensor_model_parallel_region(input, group=tp_group)
        output = multiply(input, weight, recipe)
        return output if bias is None else output + bias

    return forward
