"""doctor: reports what this machine can run, and what is missing."""

from __future__ import annotations

import importlib.util
import os
import shutil

from rich.console import Console
from rich.table import Table

from megatron_r1.config.run import RunConfig
from megatron_r1.errors import PlatformError
from megatron_r1.platform import select
from megatron_r1.runs.folder import environment


def run(config: RunConfig) -> None:
    """Print a table of the machine's hardware and software; raises PlatformError if the platform cannot be used."""
    table = Table(title="megatron-r1 doctor")
    table.add_column("what")
    table.add_column("found")
    facts = environment()
    for package, version in facts["versions"].items():
        table.add_row(package, version or "not installed")
    table.add_row("python", facts["python"])
    table.add_row("cores", str(os.cpu_count()))
    table.add_row("NVIDIA tools", shutil.which("nvidia-smi") or "none")
    table.add_row("NVIDIA Apex", _apex())
    table.add_row("bubblewrap", shutil.which("bwrap") or "not installed: code rewards cannot run programs")
    failure = None
    try:
        platform = select(config.platform)
        parts = "Transformer Engine" if platform.transformer_engine else "torch modules in its layout"
        table.add_row("platform", f"{platform.name}, {platform.backend}, {parts}")
    except PlatformError as error:
        failure = error
        table.add_row("platform", str(error))
    Console().print(table)
    if failure:
        raise failure


def _apex() -> str:
    """State of NVIDIA's apex. PyPI's `apex` is another project; NVIDIA's has `apex.optimizers`."""
    if importlib.util.find_spec("apex") is None:
        return "not installed; megatron-core runs without. It is built from NVIDIA's source with --cpp_ext --cuda_ext"
    if importlib.util.find_spec("apex.optimizers") is None:
        return "another project of the same name is installed: remove it"
    return "installed"
