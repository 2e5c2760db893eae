"""What is installed: versions of packages, the lock file that they come from, and the NVIDIA driver."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from megatron_r1.config.recipes import PACKAGE
from megatron_r1.files import digest_of

PACKAGES = (
    *("megatron_r1", "torch", "megatron-core", "transformer-engine", "transformer-engine-torch", "sgl-deep-ep"),
    *("sglang", "transformers", "tokenizers", "nvidia-cuda-runtime", "nvidia-nccl-cu13", "wandb"),
)
"""Packages whose versions a record names."""
LOCKS = ("cpu.txt", "gpu.txt")
PIN = re.compile(r"([\w.-]+)==([^\s;]+)")
DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True, slots=True)
class LockFile:
    """A lock file, and where what is installed differs from it."""

    file: str
    sha256: str
    differing: tuple[str, ...]
    """Packages as NAME PINNED, INSTALLED."""


def versions() -> dict[str, str | None]:
    """Package -> version; None where it is not installed."""
    return {name: distributions().get(canonical(name)) for name in PACKAGES}


@cache
def distributions() -> dict[str, str]:
    """Name -> version of every installed package, by the names of their folders: reading each one's takes longer."""
    found: dict[str, str] = {}
    for path in sys.path:
        for folder in Path(path or ".").glob("*.dist-info"):
            name, _, version = folder.name.removesuffix(".dist-info").rpartition("-")
            found.setdefault(canonical(name), version)
    return found


def lock(folder: Path = PACKAGE.parent / "launch" / "lock") -> LockFile | None:
    """The lock file that fits best what is installed; None where the package has none beside it."""
    found = [_compared(path) for name in LOCKS if (path := folder / name).is_file()]
    return min(found, key=lambda one: len(one.differing), default=None)


def _compared(path: Path) -> LockFile:
    pins = {found[1]: found[2] for line in path.read_text().splitlines() if (found := PIN.match(line))}
    installed = {name: distributions().get(canonical(name), "not installed") for name in pins}
    differing = [
        f"{name} {pin}, {installed[name]}"
        for name, pin in pins.items()
        if installed[name].partition("+")[0] != pin.partition("+")[0]
    ]
    return LockFile(path.name, digest_of(path), tuple(differing))


def driver(file: Path = DRIVER) -> str | None:
    """Version of the NVIDIA driver as the kernel names it; None without one."""
    try:
        found = re.search(r"\b\d{3,}\.\d+(?:\.\d+)?\b", file.read_text())
    except OSError:
        return None
    return found[0] if found else None


def canonical(name: str) -> str:
    """The name by which packages are compared (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()
