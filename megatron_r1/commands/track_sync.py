"""track sync: uploads the offline wandb runs below a folder; what is uploaded is not uploaded again."""

from __future__ import annotations

import os
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from megatron_r1.config.run import RunConfig
from megatron_r1.errors import ConfigError, PlatformError
from megatron_r1.track.sync import check_server, offline_runs, upload


def run(config: RunConfig) -> None:
    """Upload every offline run below `root`, one after the other.

    Raises:
        PlatformError: there is no key or no server, or a run could not be uploaded.
    """
    root, console = Path(config.root), Console(stderr=True, highlight=False)
    if not root.is_dir():
        raise ConfigError("root", config.root, "must be a folder of runs")
    files = offline_runs(root)
    if not files:
        console.print(f"{root}: no offline run is left to upload", soft_wrap=True)
        return
    check_server(os.environ)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    failures: dict[Path, str] = {}
    with Progress(*columns, console=console) as progress:
        for file in progress.track(files, description="uploading"):
            run_folder = file.parents[2]
            if reason := upload(file):
                failures[file] = reason
                console.print(f"{run_folder}: failed: {reason}", markup=False, soft_wrap=True)
            else:
                console.print(f"{run_folder}: uploaded", markup=False, soft_wrap=True)
    if failures:
        first, reason = next(iter(failures.items()))
        raise PlatformError(
            f"{len(failures)} of {len(files)} runs were not uploaded, {first.parents[2]} first: {reason}"
        )
