"""Saving and verifying a checkpoint beside `cp` of as much: `tools/bench/checkpoint_speed.py [--megabytes 1000]`.

The three take turns on the same disk. Saving writes, hashes and makes durable; `cp` is followed by `sync` of what it
wrote; verifying reads what has just been written, as does `cp`, so mostly from memory.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from megatron_r1.checkpoint.manifest import verify
from megatron_r1.checkpoint.sharded import TensorPart, write_parts
from megatron_r1.checkpoint.store import CheckpointStore

TENSORS = 64


def seconds(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: the system's temporary folder)")
    given = parser.parse_args()
    torch.set_num_threads(1)
    count = given.megabytes * 1_000_000 // (4 * TENSORS)
    parts = [TensorPart(str(number), (count,), (0,), torch.randn(count)) for number in range(TENSORS)]
    times: dict[str, list[float]] = {"cp": [], "save": [], "verify": []}
    with tempfile.TemporaryDirectory(dir=given.folder) as folder, CheckpointStore(Path(folder) / "saved") as store:
        copy = Path(folder) / "copy"
        for step in range(1, given.rounds + 1):
            save = seconds(lambda: store.commit(step, lambda to: write_parts(to, "model", 0, parts), {}))  # noqa: B023
            checkpoint = store.path(step)
            times["save"].append(save)
            times["verify"].append(seconds(lambda: verify(checkpoint)))  # noqa: B023
            command = 'cp -r --reflink=never "$0" "$1" && find "$1" -type f -exec sync {} +'
            times["cp"].append(seconds(lambda: subprocess.run(["sh", "-c", command, checkpoint, copy], check=True)))  # noqa: B023
            subprocess.run(["rm", "-r", copy], check=True)
            store.prune()
    size = given.megabytes / 1000
    for name, found in times.items():
        ratios = [base / mine for base, mine in zip(times["cp"], found, strict=True)]
        spread = f"{min(ratios):.2f}-{max(ratios):.2f}"
        speed = size / statistics.median(found)
        print(f"{name:<7} {speed:5.2f} GB/s  {statistics.median(ratios):.2f} times the speed of cp ({spread})")


if __name__ == "__main__":
    main()
