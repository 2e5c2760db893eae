"""doctor: reports what this machine can run, and what is missing."""

from __future__ import annotations

import importlib.util
import os
import platform as machine
import re
import shutil
import subprocess

from rich.console import Console
from rich.table import Table

from megatron_r1.config.run import RunConfig
from megatron_r1.errors import PlatformError
from megatron_r1.platform import select
from megatron_r1.platform.installed import versions
from megatron_r1.platform.kernels import HOW_TO_BUILD_APEX, apex_extensions


def run(config: RunConfig) -> None:
    """Print a table of the machine's hardware and software; raises PlatformError if the platform cannot be used."""
    table = Table(title="megatron-r1 doctor")
    table.add_column("what")
    table.add_column("found")
    for package, version in versions().items():
        table.add_row(package, version or "not installed")
    table.add_row("python", machine.python_version())
    table.add_row("cores", str(os.cpu_count()))
    table.add_row("NVIDIA driver", _driver())
    table.add_row("NVIDIA Apex", _apex())
    table.add_row("bubblewrap", shutil.which("bwrap") or "not installed: code rewards cannot run programs")
    failure = None
    try:
        platform = select(config.platform)
        parts = "Transformer Engine" if platform.transformer_engine else "torch modules in its layout"
        table.add_row("platform", f"{platform.name}, {platform.backend}, {parts}")
        if platform.name == "cuda":
            table.add_row("CUDA compiler", _compiler())
    except PlatformError as error:
        failure = error
        table.add_row("platform", str(error))
    Console().print(table)
    if failure:
        raise failure


def _driver() -> str:
    """Version of the driver by its own tool."""
    if not shutil.which("nvidia-smi"):
        return "none: GPUs need 580 or newer, which CUDA 13 does"
    return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "nvidia-smi fails"


def _compiler() -> str:
    """The nvcc by which servers compile kernels at their first start, which takes minutes."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = f"{home}/bin/nvcc" if home else shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    release = re.search(r"release ([\d.]+)", _output(nvcc, "--version"))
    if not release:
        return f"{nvcc} does not run: SGLang's servers compile kernels with it"
    return f"{nvcc}, release {release[1]}"


def _output(*command: str) -> str:
    """What a program prints; nothing if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def _apex() -> str:
    """State of NVIDIA's apex. PyPI's `apex` is another project; NVIDIA's has `apex.optimizers`."""
    if importlib.util.find_spec("apex") and not importlib.util.find_spec("apex.optimizers"):
        return "another project of the same name is installed: remove it"
    if extensions := apex_extensions():
        return ", ".join(extensions)
    return f"not installed, and needed by performance.gradient_accumulation_fusion alone; {HOW_TO_BUILD_APEX}"
