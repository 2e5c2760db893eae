"""The platform of a run: CUDA with NCCL, or a CPU with gloo.

`select` decides once, before megatron.core is imported. A GPU with a broken driver is an error: a run that was meant
for a GPU must never continue silently on the CPU.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass

from megatron_r1.errors import PlatformError


@dataclass(frozen=True)
class Platform:
    """The chosen platform.

    Attributes:
        name: ``cuda``, ``cpu``, or ``meta``: tensors without memory, by which the layout of a model is examined.
        backend: torch.distributed backend.
        transformer_engine: whether Transformer Engine's modules build the model.
    """

    name: str
    backend: str
    transformer_engine: bool

    @property
    def device(self) -> str:
        """torch device of this rank's tensors."""
        if self.name != "cuda":
            return self.name
        from megatron_r1.platform.cuda import device_index

        return f"cuda:{device_index()}"


def select(requested: str) -> Platform:
    """Choose the platform and prepare this process for it.

    Args:
        requested: ``cuda``, ``cpu`` or ``auto``.

    Raises:
        PlatformError: the requested platform is not available, or the machine has a GPU that cannot be used.
    """
    if requested == "auto":
        if "SLURM_JOB_ID" in os.environ:
            raise PlatformError("platform=auto: inside a SLURM job it must be cuda or cpu")
        requested = "cuda" if _gpu_present() else "cpu"
    return PLATFORMS[requested]()


def cuda_platform() -> Platform:
    """NCCL, and Transformer Engine where it is installed."""
    from megatron_r1.platform import cuda

    return Platform("cuda", "nccl", transformer_engine=cuda.prepare())


def cpu_platform() -> Platform:
    """gloo, and torch modules in Transformer Engine's layout."""
    from megatron_r1.platform import cpu

    cpu.prepare()
    return Platform("cpu", "gloo", transformer_engine=False)


PLATFORMS: dict[str, Callable[[], Platform]] = {"cuda": cuda_platform, "cpu": cpu_platform}
"""What prepares a process, by the platform's name. Tests put Transformer Engine on a CPU in the place of ``cpu``."""


def _gpu_present() -> bool:
    """Whether this machine has an NVIDIA GPU, by its device files or tools, working or not."""
    return (
        os.path.exists("/dev/nvidia0")
        or os.path.exists("/proc/driver/nvidia/version")
        or bool(shutil.which("nvidia-smi"))
    )
