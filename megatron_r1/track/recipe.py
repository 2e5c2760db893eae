"""A recipe in wandb, beside the runs of its stages: its page, and the responses of its evaluations as tables."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import orjson

from megatron_r1.config.jobs import TrackConfig
from megatron_r1.track.artifacts import add_files, add_table
from megatron_r1.track.identity import Identity, wandb_mode
from megatron_r1.track.wandb_run import WandbRun

JOB_TYPE = "report"
MAX_ROWS = 1000
"""Responses of one model in its table, from the first."""


def track_recipe(folder: Path, name: str, track: TrackConfig) -> None:
    """Record the page and the samples of a recipe in its group; does nothing where no stage is in wandb.

    Args:
        folder: of the recipe, with the stages' folders.
        name: of the recipe.
    """
    if not any(folder.glob("*/wandb")):
        return
    identity = Identity.of(name, track, JOB_TYPE, os.environ)
    run = WandbRun(folder, wandb_mode(track.wandb, os.environ), {}, replace(identity, group=identity.group or name))
    run.add(add_files("report", name, [folder / "report.html", folder / "pipeline.json"]))
    for path in sorted(folder.glob("*/samples/*.jsonl")):
        stage, model = path.parents[1].name, path.stem
        run.add(add_table("samples", f"{name}-{stage}-{model}", "responses", [*islice(_rows(path), MAX_ROWS)]))
    run.close()


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as file:
        yield from map(orjson.loads, file)
