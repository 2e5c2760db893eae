"""The folder of a run: its configuration, what it came from, and the marker that it is done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_r1.config.load import difference, read_yaml, resolved, write_yaml
from megatron_r1.config.run import RunConfig
from megatron_r1.errors import ConfigError
from megatron_r1.files import write_whole
from megatron_r1.platform.launcher import is_rank_zero
from megatron_r1.runs.provenance import record_attempt

FREE_TO_CHANGE = (
    "cluster.",
    "submit.",
    "track.",
    "profile.",
    "check.",
    "plan.",
    "watch.",
    "train.log_interval",
    "train.save_interval",
    "train.async_save",
    "train.save_total_limit",
    "train.keep_every",
    "train.keep_best",
    "train.save_before_limit_s",
    "threads",
    "distributed_timeout_minutes",
    "platform",
    "parallel.",
    "performance.",
    "rollout.sglang.",
    "convert.workers",
    "reward.math.workers",
    "rl.sample_table_interval",
    "rl.sample_table_rows",
    "reward.sandbox.max_parallel",
    "reward.judge_config.concurrency",
)
"""Keys that do not change results: a resumed run may change them, and a recipe does not repeat a stage for them."""
DONE = "done.json"


def run_folder(config: RunConfig) -> Path:
    """Folder of the run with this configuration."""
    return Path(config.root) / config.name


def open_run_folder(config: RunConfig) -> Path:
    """Create or open the run's folder; on rank 0, write its configuration or compare it with the folder's, and
    record the attempt.

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
    record_attempt(folder)
    return folder


def mark_done(folder: Path, facts: dict[str, Any]) -> None:
    """Write the marker that tells a recipe that the run is complete."""
    write_whole(folder / DONE, json.dumps(facts, indent=1, default=str).encode())


def is_done(folder: Path) -> bool:
    """Whether the run has finished."""
    return (folder / DONE).is_file()
