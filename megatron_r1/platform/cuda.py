"""CUDA: NCCL, and Transformer Engine where it is installed.

Transformer Engine multiplies fp32 matrices in TF32, which has 11 bits of mantissa, and nothing switches that off; so do
the two products that give the gradients of a router, which are fp32 in bf16 models too. No result on CUDA is to be held
to the tolerances of fp32.
"""

from __future__ import annotations

import ctypes
import importlib
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_r1.errors import PlatformError
from megatron_r1.platform.kernels import installed
from megatron_r1.platform.launcher import local_rank

logger = logging.getLogger(__name__)


def prepare() -> bool:
    """Bind this process to its GPU, before megatron.core is imported.

    Returns:
        Whether Transformer Engine builds the model.

    Raises:
        PlatformError: no usable GPU, or a Transformer Engine that cannot be imported.
    """
    if not torch.cuda.is_available():
        raise PlatformError(
            "platform=cuda: torch finds no usable GPU (driver missing, broken or older than 580: check nvidia-smi); "
            "platform=cpu runs without one"
        )
    if (index := device_index()) >= (gpus := torch.cuda.device_count()):
        raise PlatformError(f"LOCAL_RANK={index}: each rank needs a GPU, and CUDA_VISIBLE_DEVICES shows {gpus}")
    torch.cuda.set_device(index)
    take_cuda_from_packages()
    _complete_deep_ep()
    return _import_transformer_engine()


def take_cuda_from_packages() -> None:
    """Have compilers of kernels and Transformer Engine take CUDA from this environment, as torch does.

    They would prefer a CUDA toolkit of the machine, which may have another version than the libraries that torch has
    loaded: FlashInfer, DeepGEMM, DeepEP and SGLang compile with CUDA_HOME's nvcc, and Transformer Engine 2.20.2 looks
    for each library in a variable of its own first (common/__init__.py). What the user has set stays.
    """
    for variable, folder in _cuda_folders():
        os.environ.setdefault(variable, str(folder))


def load_cudnn() -> None:
    """Load all of CUDNN_HOME, of which Transformer Engine would load one library where its own needs several."""
    if home := os.environ.get("CUDNN_HOME"):
        for library in sorted(Path(home).glob("lib/lib*.so.*")):
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def _cuda_folders() -> Iterator[tuple[str, Path]]:
    spec = importlib.util.find_spec("nvidia")
    major = (torch.version.cuda or "").partition(".")[0]
    for root in map(Path, (spec and spec.submodule_search_locations) or ()):
        cuda = root / f"cu{major}"
        if (cuda / "bin" / "nvcc").is_file():
            yield "CUDA_HOME", cuda
        for variable, folder, library in (
            ("CUDNN_HOME", root / "cudnn", "libcudnn"), ("NVRTC_HOME", cuda, "libnvrtc"),
            ("CURAND_HOME", cuda, "libcurand"),
        ):  # fmt: skip
            if any((folder / "lib").glob(f"{library}.so*")):
                yield variable, folder


def _complete_deep_ep() -> None:
    """Give DeepEP the names that megatron-core imports, or hide it.

    megatron-core 0.19.2 imports EventOverlap from deep_ep.utils (transformer/moe/fused_a2a.py), from where DeepEP 2.1
    has moved it, and takes nothing but an ImportError for DeepEP's absence.
    """
    if not installed("deep_ep"):
        return
    try:
        package, utils = importlib.import_module("deep_ep"), importlib.import_module("deep_ep.utils")
    except Exception as error:  # it asserts, and loads libraries of the machine
        logger.warning("deep_ep cannot be imported, so the dispatcher deepep is not available: %s", _reason(error))
        modules: dict[str, Any] = sys.modules
        modules["deep_ep"] = None
        return
    if not hasattr(utils, "EventOverlap"):
        utils.EventOverlap = package.EventOverlap  # type: ignore[attr-defined]


def _import_transformer_engine() -> bool:
    """Whether Transformer Engine is there; megatron-core would import a broken one and end in a traceback."""
    if not installed("transformer_engine"):
        return False
    try:
        load_cudnn()
        importlib.import_module("transformer_engine.pytorch")
    except Exception as error:  # a missing extension is a FileNotFoundError, other versions are assertions
        raise PlatformError(
            f"platform=cuda: Transformer Engine is installed but cannot be imported ({_reason(error)}): "
            "MEGATRON_R1_LOCK=gpu launch/setup.sh builds it"
        ) from error
    return True


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")


def device_index() -> int:
    """This rank's GPU: the one of its local rank, or the only one that SLURM shows this task."""
    return 0 if torch.cuda.device_count() == 1 else local_rank()
