"""fp8_product.py PLATFORM FILE: Transformer Engine's blockwise FP8 linear layer beside this project's exact one.

FILE gets, as JSON, the relative differences of output, input gradient and weight gradient: between the two, and between
the exact one and a product without FP8.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import Tensor

from megatron_r1.platform import select


def main(device: str, file: str) -> None:
    platform = select(device)
    from megatron_r1.model.fp8.linear import LinearRecipe, multiply

    draw = torch.Generator().manual_seed(0)
    x_TK, weight_NK, gradient_TN = (
        torch.randn(*shape, generator=draw).to(platform.device, torch.bfloat16)
        for shape in ((256, 512), (384, 512), (256, 384))
    )
    recipe = LinearRecipe(power_of_two_inputs=True, power_of_two_gradients=True)

    def through(layer) -> list[Tensor]:
        x, weight = x_TK.clone().requires_grad_(), weight_NK.clone().requires_grad_()
        product_TN = layer(x, weight)
        product_TN.backward(gradient_TN)
        return [product_TN.detach(), x.grad, weight.grad]

    exact = through(lambda x, weight: multiply(x, weight, recipe))
    plain = through(torch.nn.functional.linear)
    kernel = through(_transformer_engine) if platform.transformer_engine else exact
    names = ("output", "input_gradient", "weight_gradient")
    found = {
        against: {name: _difference(one, two) for name, one, two in zip(names, results, exact, strict=True)}
        for against, results in (("kernel", kernel), ("plain", plain))
    }
    Path(file).write_text(json.dumps(found))


def _transformer_engine(x: Tensor, weight_NK: Tensor) -> Tensor:
    """The layer that megatron-core builds, with the recipe that it takes for `fp8=deepseek`; its gradient is copied."""
    import transformer_engine.pytorch as te
    from transformer_engine.common.recipe import Float8BlockScaling

    outputs, inputs = weight_NK.shape
    layer = te.Linear(inputs, outputs, bias=False, params_dtype=torch.bfloat16, device=weight_NK.device)
    with torch.no_grad():
        layer.weight.copy_(weight_NK)
    layer.weight.register_hook(lambda gradient: setattr(weight_NK, "grad", gradient))
    with te.fp8_autocast(enabled=True, fp8_recipe=Float8BlockScaling()):
        return layer(x)


def _difference(one: Tensor, two: Tensor) -> float:
    return float((one.float() - two.float()).norm() / two.float().norm())


if __name__ == "__main__":
    main(*sys.argv[1:])
