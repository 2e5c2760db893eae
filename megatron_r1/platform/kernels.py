"""Packages of CUDA kernels that megatron-core uses where they can be imported: NVIDIA Apex and DeepEP; without torch.

megatron-core 0.19.2 takes from Apex what Transformer Engine lacks: ``fused_weight_gradient_mlp_cuda``, which adds the
output layer's weight gradient to its buffer in the product itself (tensor_parallel/layers.py). Its optimizer and
``amp_C``'s norms count only where there is no Transformer Engine.
"""

from __future__ import annotations

import importlib.util
import sys

from megatron_r1.config.performance import PerformanceConfig
from megatron_r1.errors import ConfigError

APEX_FUSION = "fused_weight_gradient_mlp_cuda"
_APEX = ("amp_C", APEX_FUSION)
HOW_TO_BUILD_APEX = (
    "built from NVIDIA's source (PyPI's apex is another project): in its checkout, with .venv's Python, "
    "APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install --no-build-isolation ."
)


def installed(module: str) -> bool:
    """Whether a module would be found; one that was hidden from megatron-core is not."""
    return importlib.util.find_spec(module) is not None


def apex_extensions() -> list[str]:
    """Apex's compiled extensions that are installed, of those that megatron-core imports."""
    return [name for name in _APEX if installed(name)]


def refuse_missing_kernels(performance: PerformanceConfig) -> None:
    """Refuse what needs kernels that this environment lacks; to call once the platform is CUDA.

    Raises:
        ConfigError: names the key and the package.
    """
    if performance.gradient_accumulation_fusion and not installed(APEX_FUSION):
        raise ConfigError(
            "performance.gradient_accumulation_fusion", True, f"needs NVIDIA Apex, which is {HOW_TO_BUILD_APEX}"
        )
    dispatcher = performance.moe_token_dispatcher_type
    if dispatcher in ("deepep", "hybridep") and not installed("deep_ep"):
        raise ConfigError(
            "performance.moe_token_dispatcher_type",
            dispatcher,
            "needs the package deep_ep, which is missing or cannot be imported here; alltoall needs nothing",
        )
    if dispatcher == "hybridep" and not hasattr(sys.modules.get("deep_ep"), "HybridEPBuffer"):
        raise ConfigError(
            "performance.moe_token_dispatcher_type",
            dispatcher,
            "needs DeepEP's branch hybrid-ep; the deep_ep that is installed has deepep only",
        )
