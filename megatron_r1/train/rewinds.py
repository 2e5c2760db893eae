"""Rewinds of a run: which data it skips because of spikes, and which of its checkpoints do not count any more.

A run that goes back ends its attempt; the next start resumes from a checkpoint before the spike, as every resume does.
The record of a rewind names positions in the data, not a checkpoint: from whichever checkpoint a run starts, it skips
the same sequences, and is bitwise the run that never had them.

    RUN/rewinds/0001.json    the first one
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_r1.errors import DataError
from megatron_r1.files import read_json, write_whole
from megatron_r1.train.state import TrainState

if TYPE_CHECKING:
    from megatron_r1.train.loop import Step

FOLDER = "rewinds"
IN_MANIFEST = "rewinds"
"""In a checkpoint's manifest: how many rewinds the run had when it was saved; absent for none."""


@dataclass(frozen=True, kw_only=True)
class Rewind:
    """One rewind. Positions are numbers of sequences since the start of the data."""

    first_step: int
    """The first step whose data is skipped; checkpoints of it and of later steps do not count any more."""
    spike_step: int
    """The first step of the spike."""
    last_step: int
    """The step after which the run went back."""
    skip_from: int
    """Position before `first_step`."""
    skip_to: int
    """Position after `last_step`."""
    values: Mapping[str, float] = field(default_factory=dict)
    """Loss and gradient norm of `last_step`."""
    time: str = field(default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%S%z"))


def read_rewinds(run_folder: Path) -> list[Rewind]:
    """The rewinds of a run, in order; raises DataError for a record that is none."""
    found = []
    for path in sorted((run_folder / FOLDER).glob("*.json")):
        try:
            found.append(Rewind(**read_json(path)))
        except TypeError:
            raise DataError(f"{path}: is no record of a rewind") from None
    return found


def record_rewind(run_folder: Path, rewind: Rewind) -> None:
    """Add a rewind to the run's record, durably."""
    folder = run_folder / FOLDER
    folder.mkdir(exist_ok=True)
    number = len(read_rewinds(run_folder)) + 1
    write_whole(folder / f"{number:04}.json", json.dumps(asdict(rewind), indent=1).encode())


def next_position(position: int, rewinds: Sequence[Rewind]) -> int:
    """The position from which a step at `position` reads its data: the same, or the end of what is skipped there."""
    for rewind in sorted(rewinds, key=lambda rewind: rewind.skip_from):
        if rewind.skip_from <= position < rewind.skip_to:
            position = rewind.skip_to
    return position


def skipped_sequences(rewinds: Sequence[Rewind]) -> int:
    """How many sequences are skipped in all."""
    count = reached = 0
    for rewind in sorted(rewinds, key=lambda rewind: rewind.skip_from):
        count += max(0, rewind.skip_to - max(rewind.skip_from, reached))
        reached = max(reached, rewind.skip_to)
    return count


def is_undone(metadata: Mapping[str, Any], rewinds: Sequence[Rewind]) -> bool:
    """Whether a checkpoint, by its manifest's metadata, is of steps that a later rewind has undone."""
    later = rewinds[metadata.get(IN_MANIFEST, 0) :]
    return any(metadata["step"] >= rewind.first_step for rewind in later)


def skipping(step: Step, rewinds: Sequence[Rewind]) -> Step:
    """The same step, which leaves out the data that is skipped."""
    if not rewinds:
        return step

    def skip_then_step(state: TrainState) -> tuple[TrainState, dict[str, Any]]:
        return step(replace(state, data_position=next_position(state.data_position, rewinds)))

    return skip_then_step
