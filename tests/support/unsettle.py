"""Weights as training leaves them, where first weights would hide a mistake."""

from __future__ import annotations

from typing import Any

import torch


def unsettled(model: Any) -> Any:
    """The model, its norms, biases and balancing bias moved: none of them is neutral any more."""
    from megatron_r1.model.build import native_tensors

    generator = torch.Generator().manual_seed(9)
    for name, tensor in native_tensors(model):
        if tensor.dim() == 1:
            spread = 0.05 if name.endswith("expert_bias") else 0.2
            tensor.add_(torch.randn(tensor.shape, generator=generator) * spread)
    return model
