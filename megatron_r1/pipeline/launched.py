"""One stage of a recipe on ranks that a launcher has started, on one node or many; rank 0 alone keeps the recipe.

Every rank gets the recipe's own command. Rank 0 prepares the stage's folder, writes down what the stage's ranks run,
and starts its own; the others wait for that, and become what it says.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from megatron_r1.config.run import RunConfig
from megatron_r1.errors import ConfigError, DataError, PlatformError
from megatron_r1.files import read_json, write_whole
from megatron_r1.pipeline.compose import ComposedStage
from megatron_r1.pipeline.ranks import RankProcesses
from megatron_r1.pipeline.recipe import ComposedRecipe
from megatron_r1.pipeline.run import PROGRAM, StartStage
from megatron_r1.platform.launcher import world_size
from megatron_r1.runs.folder import run_folder

WAIT_S, POLL_S = 1800.0, 0.2
"""Seconds that other ranks wait for rank 0, which may hash large files first, and between two looks."""
LAUNCH = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT",
          "MASTER_ADDR", "MASTER_PORT")  # fmt: skip
"""Variables that are the same for all ranks of a start, and others for the next start."""


@contextmanager
def leading(recipe: ComposedRecipe) -> Iterator[StartStage]:
    """On rank 0: how the recipe starts its stage; afterwards ranks that still wait learn that there is nothing to run.

    Raises:
        ConfigError: no single stage is chosen, or it has another number of ranks than the launcher has started.
    """
    stage, ranks = recipe.stages[_only(recipe.config.only)], world_size()
    if stage.ranks != ranks:
        allowed = f"must be {ranks}, the ranks that the launcher has started (pipeline.ranks is for all stages)"
        raise ConfigError(f"pipeline.stages.{stage.name}.ranks", stage.ranks, allowed)
    record, started = _record(recipe.folder, stage.name), []

    def start(stage: ComposedStage, prefix: str) -> RankProcesses:
        started.append(stage)
        _write(record, stage.arguments)
        return RankProcesses([*PROGRAM, *stage.arguments], 1, prefix, launched=True)

    yield start
    if not started:
        _write(record, ())


def follow(config: RunConfig) -> None:
    """On other ranks: become the stage's rank; returns where the stage is done already.

    Raises:
        PlatformError: rank 0 does not say in time what to run.
    """
    record = _record(run_folder(config), _only(config.pipeline.only))
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        try:
            found = read_json(record)
        except DataError:
            found = {}
        if found and _is_ours(found):
            if found["arguments"]:
                _become([*PROGRAM, *found["arguments"]])
            return
        time.sleep(POLL_S)
    raise PlatformError(f"{record}: rank 0 has not written it in {WAIT_S:g} s: is the folder shared by all nodes?")


def _become(command: list[str]) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(command[0], command)


def _only(name: str) -> str:
    if not name:
        allowed = f"must name one stage: its ranks are the {world_size()} that the launcher has started"
        raise ConfigError("pipeline.only", name, allowed)
    return name


def _record(folder: Path, stage: str) -> Path:
    return folder / f".ranks-of-{stage}.json"


def _write(path: Path, arguments: Sequence[str]) -> None:
    write_whole(path, json.dumps({"launch": _launch(os.environ), "arguments": arguments}).encode())


def _is_ours(record: Mapping[str, object]) -> bool:
    return record.get("launch") == _launch(os.environ)


def _launch(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: environment[name] for name in LAUNCH if name in environment}
