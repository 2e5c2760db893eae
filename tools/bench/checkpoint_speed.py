"""Saving and verifying a checkpoint beside `cp` of the same bytes.

`tools/bench/checkpoint_speed.py [--megabytes 1000] [--rounds 7] [--folder FOLDER]`

The checkpoint is that of one rank: weights and the optimizer's two moments, of tensors whose sizes are drawn. The ways
take turns on one disk, each with nothing left to write by others. Saving hashes, writes and makes durable; `cp` does
not wait for the disk, `cp, sync` does; `save, no fsync` says what share waiting has. Verifying reads what was written
just before, as `cp` does: from memory.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from unittest.mock import patch

import torch
from blake3 import blake3

from megatron_r1.checkpoint.manifest import FileRecord, verify
from megatron_r1.checkpoint.sharded import TensorPart, WholeTensors, write_parts
from megatron_r1.checkpoint.store import CheckpointStore, step_folders
from tools.bench.comparison import Way, alternate, describe, seconds_of

KINDS = ("model", "exp_avg", "exp_avg_sq")
REST_S = 1.5
"""Before each way: a disk that has just freed a gigabyte is slow."""
LARGEST = 16_000_000
"""Elements of a tensor."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: the system's temporary folder)")
    return parser.parse_args()


def drawn_sizes(elements: int, seed: int) -> list[int]:
    """Numbers of elements, from a thousand to LARGEST, evenly over their logarithm."""
    chance, sizes = random.Random(seed), []
    while elements:
        sizes.append(min(elements, int(1000 * (LARGEST / 1000) ** chance.random())))
        elements -= sizes[-1]
    return sizes


def hash_speed(seconds: float = 1.0) -> float:
    """Bytes of BLAKE3 per second of a core."""
    content, done, started = os.urandom(1 << 24), 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        blake3(content).digest()
        done += len(content)
    return done / (time.perf_counter() - started)


def main() -> None:
    given = arguments()
    torch.set_num_threads(1)
    sizes = drawn_sizes(given.megabytes * 1_000_000 // (4 * len(KINDS)), given.seed)
    parts = {
        kind: [TensorPart(str(n), (size,), (0,), torch.randn(size)) for n, size in enumerate(sizes)] for kind in KINDS
    }
    with tempfile.TemporaryDirectory(dir=given.folder) as folder, CheckpointStore(Path(folder) / "saved") as store:
        copy, steps = Path(folder) / "copy", count(1)

        def newest() -> Path:
            return step_folders(store.folder)[0][1]

        def write(to: Path) -> dict[str, FileRecord]:
            return {name: record for kind in KINDS for name, record in write_parts(to, kind, 0, parts[kind]).items()}

        def save() -> None:
            store.commit(next(steps), write, {})

        def save_without_fsync() -> None:
            with patch("os.fsync"), patch("os.posix_fadvise"):
                save()

        def copied() -> None:
            subprocess.run(["cp", "-r", "--reflink=never", newest(), copy], check=True)

        def copied_to_disk() -> None:
            copied()
            subprocess.run(["sync", *copy.iterdir()], check=True)

        def settled(action: Callable[[], object]) -> Way:
            """The way whose seconds are those of `action`, begun without old copies and with nothing to write."""

            def way() -> float:
                shutil.rmtree(copy, ignore_errors=True)
                store.prune()
                os.sync()
                time.sleep(REST_S)
                return seconds_of(action)()

            return way

        save()
        with WholeTensors(newest(), KINDS[1]) as stored:  # both sides must be of the same bytes
            assert all(torch.equal(stored[part.name], part.tensor) for part in parts[KINDS[1]])
        ways = {
            "cp": settled(copied),
            "cp, sync": settled(copied_to_disk),
            "save": settled(save),
            "save, no fsync": settled(save_without_fsync),
            "verify": settled(lambda: verify(newest())),
        }
        found = alternate(ways, given.rounds)
    print(f"{len(sizes) * len(KINDS)} tensors in {len(KINDS)} files; {os.cpu_count()} cores; {given.rounds} rounds")
    print(f"BLAKE3: {hash_speed() / 1e9:.2f} GB/s on one core")
    print(describe(found, "cp", given.megabytes / 1000, "GB"))
    print(describe({name: found[name] for name in ("cp, sync", "save", "verify")}, "cp, sync"))


if __name__ == "__main__":
    main()
