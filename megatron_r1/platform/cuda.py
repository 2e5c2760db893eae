"""CUDA: NCCL, and Transformer Engine where it is installed."""

from __future__ import annotations

import importlib.util
import os

import torch

from megatron_r1.errors import PlatformError


def prepare() -> bool:
    """Bind this process to its GPU.

    Returns:
        Whether Transformer Engine can be imported.

    Raises:
        PlatformError: no usable GPU.
    """
    if not torch.cuda.is_available():
        raise PlatformError(
            "platform=cuda: torch finds no usable GPU (driver missing or broken: check nvidia-smi); "
            "platform=cpu runs without one"
        )
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    return importlib.util.find_spec("transformer_engine") is not None
