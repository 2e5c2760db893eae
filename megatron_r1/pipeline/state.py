"""What a recipe's folder holds of each stage: done, stale and why, failed or missing; and runs that were replaced.

Each stage's folder has a `stage.json` with the identity of its run. A run of another identity is moved to
`replaced/STAGE-IDENTITY`, and comes back from there when the recipe says again what it was made from.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_r1.config.pipeline import REPLACED
from megatron_r1.errors import DataError, ExitCode
from megatron_r1.files import read_json, sync, write_whole
from megatron_r1.pipeline.compose import ComposedStage
from megatron_r1.pipeline.identity import StageIdentity, changes
from megatron_r1.runs.folder import is_done

RECORD = "stage.json"
INTERRUPTED = 130
"""Exit code of a stage that Ctrl-C ended at once."""
SHORT = 8
"""Digits of an identity in the name of a replaced folder."""
MOST_CHANGES = 3
"""Changes that are listed of a stale stage."""


@dataclass(frozen=True)
class StageState:
    """The state of one stage."""

    state: str
    """done, running, stale, missing or failed."""
    why: str = ""
    seconds: float = 0.0
    """Total seconds of its runs until now."""
    started: str = ""
    """When its first run began."""


def state_of(stage: ComposedStage, identity: StageIdentity) -> StageState:
    """The state of a stage that does not run now."""
    if not stage.folder.exists():
        return StageState("missing", "an earlier run comes back" if _replaced(stage, identity.digest).exists() else "")
    record = read_record(stage.folder)
    seconds, started = record.get("seconds", 0.0), record.get("started", "")
    if record.get("identity") != identity.digest:
        why = _why_stale(record, identity, stage)
        return StageState("stale", why, seconds, started)
    if is_done(stage.folder):
        return StageState("done", "", seconds, started)
    if code := record.get("failed"):
        return StageState("failed", f"exit code {code}; resumes", seconds, started)
    return StageState("missing", "interrupted; resumes", seconds, started)


def _why_stale(record: Mapping[str, Any], identity: StageIdentity, stage: ComposedStage) -> str:
    if not record:
        return "it has no record of what it was made from"
    found = changes(record, identity, {key: output.stage for key, output in stage.inputs.items()})
    more = f"; {len(found) - MOST_CHANGES} more" if len(found) > MOST_CHANGES else ""
    return "; ".join(found[:MOST_CHANGES]) + more or f"verb {record.get('verb')} -> {stage.verb}"


def read_record(folder: Path) -> dict[str, Any]:
    """What a stage's folder says about its run; empty where it says nothing."""
    try:
        return read_json(folder / RECORD)
    except DataError:
        return {}


def prepare_folder(stage: ComposedStage, identity: StageIdentity) -> None:
    """Make the stage's folder one of this identity: as it is, back from the replaced ones, or a new one."""
    record = read_record(stage.folder)
    if record.get("identity") == identity.digest:
        return
    if record or is_done(stage.folder) or (stage.folder / "config.yaml").exists():
        _move(stage.folder, _unused(_replaced(stage, record.get("identity", "unrecorded"))))
    if (earlier := _replaced(stage, identity.digest)).exists():
        _move(earlier, stage.folder)
        return
    stage.folder.mkdir(parents=True, exist_ok=True)
    write_record(stage.folder, {"verb": stage.verb, **identity.as_record()})


def note_start(folder: Path) -> None:
    """Record that a stage starts, or resumes, now."""
    record = read_record(folder) | {"failed": 0}
    write_record(folder, {"started": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "seconds": 0.0} | record)


def note_end(folder: Path, seconds: float, code: int) -> None:
    """Record how long a run of a stage took, and the exit code that it failed with, if it was not interrupted."""
    record, failed = read_record(folder), 0 if code in (ExitCode.REQUEUE, INTERRUPTED) else code
    write_record(folder, record | {"seconds": round(record.get("seconds", 0.0) + seconds, 1), "failed": failed})


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Write `stage.json`."""
    write_whole(folder / RECORD, json.dumps(record, indent=1).encode())


def _replaced(stage: ComposedStage, digest: str) -> Path:
    return stage.folder.parent / REPLACED / f"{stage.name}-{digest[:SHORT]}"


def _unused(path: Path) -> Path:
    """The path, or where something is there already, the next one with a number."""
    numbered = (path.with_name(f"{path.name}-{number}") for number in range(2, 1_000_000))
    return path if not path.exists() else next(other for other in numbered if not other.exists())


def _move(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    source.rename(target)
    sync(target.parent)
    sync(source.parent)
