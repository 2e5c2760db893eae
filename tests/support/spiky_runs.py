"""Pre-training on two ranks over data with two bad batches, whose spike undoes steps; and a run that never had them.

    python -m tests.support.spiky_runs FOLDER

FOLDER/found.json tells what became of each run: exit codes of its attempts, rows, files of its last checkpoint.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from megatron_r1.train.rewinds import Rewind, read_rewinds, record_rewind
from tests.support.fork_server import import_verbs
from tests.support.hangs import checkpoints_of, rows_of, run

RANKS, SIZE = 2, 4
SPIKE, STEPS = 40, 48
"""First step of the spike, which the median of 32 steps shows, and of the run."""
REWINDING = [
    "pretrain", "platform=cpu", "threads=1", "track=off", "seed=3", "data.num_documents=300", "model.num_layers=2",
    "model.mtp.num_layers=0", "train.schedule.warmup_steps=2", "train.sequence_length=32",
    f"train.global_batch_size={SIZE}", "train.micro_batch_size=2", f"train.steps={STEPS}", "train.save_interval=4",
    "watch.max_rewinds=1", "watch.rewind_after_spikes=2",
]  # fmt: skip
BAD = range((SPIKE - 1) * SIZE, (SPIKE + 1) * SIZE)
"""Positions of the sequences of noise: those of two steps."""
MOST_ATTEMPTS = 4


def plant(root: Path) -> None:
    """Make the sequences bad, and have ranks die before they read those for which FOLDER/kill-POSITION-RANK exists."""
    from megatron_r1.data.pretraining.corpus import Corpus

    batch = Corpus.batch

    def planted(self: Any, position: int, size: int) -> np.ndarray:
        kill = root / f"kill-{position}-{os.environ['RANK']}"
        if kill.exists():
            kill.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        rows = batch(self, position, size)
        for row in range(size):
            if position + row in BAD:
                rows[row] = np.random.default_rng(position + row).integers(6, 500, rows.shape[1])
        return rows

    Corpus.batch = planted  # type: ignore[method-assign]


def outcome(root: Path, name: str, arguments: list[str], kills: tuple[int, ...] = ()) -> dict[str, Any]:
    """Starts the run until it is done, which it is after a few attempts, or never."""
    for position, rank in product(kills, range(RANKS)):
        (root / f"kill-{position}-{rank}").touch()
    attempts, log = [], ""
    while len(attempts) < MOST_ATTEMPTS and (not attempts or any(attempts[-1])):
        codes = run(RANKS, root, name, arguments)
        attempts.append([codes[rank] for rank in range(RANKS)])
        log += (root / f"{name}-0.log").read_text(errors="replace")
    return {
        "attempts": attempts,
        "rows": rows_of(root / name),
        "saved": checkpoints_of(root / name).get(STEPS, {}),
        "log": log,
    }


def main(root: Path) -> None:
    import_verbs("pretrain")
    plant(root)
    (root / "without").mkdir()
    bad = {"first_step": SPIKE, "spike_step": SPIKE, "last_step": SPIKE + 1}
    record_rewind(root / "without", Rewind(**bad, skip_from=BAD.start, skip_to=BAD.stop))
    found = {"without": outcome(root, "without", REWINDING)}
    # Within the spike, of which there is a checkpoint; and in the steps that are done again, of which there is one too.
    found["killed"] = outcome(root, "killed", REWINDING, (SPIKE * SIZE, (SPIKE + 6) * SIZE))
    rewinds = [asdict(rewind) for rewind in read_rewinds(root / "killed")]
    (root / "found.json").write_text(json.dumps(found | {"rewinds": rewinds}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
