"""The folder of a run: its configuration, its environment, and the marker that it is done."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform as machine
import subprocess
import time
from pathlib import Path
from typing import Any

from megatron_r1.config.load import difference, read_yaml, resolved, write_yaml
from megatron_r1.config.run import RunConfig
from megatron_r1.errors import ConfigError
from megatron_r1.files import write_whole
from megatron_r1.platform.kernels import apex_extensions
from megatron_r1.platform.launcher import is_rank_zero

FREE_TO_CHANGE = (
    "cluster.",
    "submit.",
    "track.",
    "profile.",
    "check.",
    "train.log_interval",
    "train.save_interval",
    "train.async_save",
    "train.save_total_limit",
    "train.save_before_limit_s",
    "threads",
    "distributed_timeout_minutes",
    "platform",
    "parallel.",
    "performance.",
    "rollout.sglang.",
    "convert.workers",
    "reward.math.workers",
    "reward.sandbox.max_parallel",
    "reward.judge_config.concurrency",
)
"""Keys that do not change results: a resumed run may change them, and a recipe does not repeat a stage for them."""
_PACKAGES = (
    *("megatron_r1", "torch", "megatron-core", "transformer-engine", "transformer-engine-torch", "sgl-deep-ep"),
    *("sglang", "transformers", "tokenizers"),
)
DONE = "done.json"


def run_folder(config: RunConfig) -> Path:
    """Folder of the run with this configuration."""
    return Path(config.root) / config.name


def open_run_folder(config: RunConfig) -> Path:
    """Create or open the run's folder; on rank 0, write its configuration or compare it with the folder's.

    Raises:
        ConfigError: the folder holds a run with another configuration; the message shows each difference.
    """
    folder = run_folder(config)
    folder.mkdir(parents=True, exist_ok=True)
    if not is_rank_zero():
        return folder
    pinned = folder / "config.yaml"
    if pinned.exists():
        changes = [
            line for line in difference(read_yaml(pinned), resolved(config)) if not line.startswith(FREE_TO_CHANGE)
        ]
        if changes:
            raise ConfigError(
                "name", config.name, f"{folder} is a run with another configuration: {'; '.join(changes)}"
            )
    write_yaml(config, pinned)
    write_whole(folder / "environment.json", json.dumps(environment(), indent=1).encode())
    return folder


def environment() -> dict[str, Any]:
    """Versions and machine, for the record."""
    versions: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "versions": versions,
        "apex": apex_extensions(),
        "python": machine.python_version(),
        "system": machine.platform(),
        "cores": os.cpu_count(),
        "git": _git_revision(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _git_revision() -> str | None:
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def mark_done(folder: Path, facts: dict[str, Any]) -> None:
    """Write the marker that tells a recipe that the run is complete."""
    write_whole(folder / DONE, json.dumps(facts, indent=1, default=str).encode())


def is_done(folder: Path) -> bool:
    """Whether the run has finished."""
    return (folder / DONE).is_file()
