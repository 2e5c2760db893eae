"""Pre-training from the command line: the same seed gives the same run to the last bit, stopped half way or not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

DRIVER = """
import os, signal, sys
from megatron_r1.__main__ import exit_code
from megatron_r1.data.corpus import Corpus

names, stop_at = sys.argv[1].split(","), int(sys.argv[2])
batch = Corpus.batch

def batch_or_signal(self, position, count):
    if position == stop_at * count:
        os.kill(os.getpid(), signal.SIGTERM)
    return batch(self, position, count)

Corpus.batch = batch_or_signal
sys.exit(max(exit_code(["pretrain", f"name={name}", *sys.argv[3:]]) for name in names))
"""
SETTINGS = [
    "platform=cpu", "threads=1", "track=off", "seed=3", "data.num_documents=2000", "model.num_layers=2",
    "model.init_std=0.02", "train.steps=8", "train.sequence_length=64", "train.global_batch_size=4",
    "train.micro_batch_size=2", "train.schedule.warmup_steps=2", "train.checkpoint_interval=100",
]  # fmt: skip


def pretrain(names: str, root: Path, stop_at: int = -1) -> int:
    """Exit code of runs, one after the other in one process; `stop_at` steps are done when the signal comes."""
    command = [sys.executable, "-W", "ignore", "-c", DRIVER, names, str(stop_at - 1), *SETTINGS, f"root={root}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode in (0, 85), done.stderr
    return done.returncode


def curve(folder: Path) -> list[list[str]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [[float(row[key]).hex() for key in ("loss", "mtp_loss", "gradient_norm", "learning_rate")] for row in rows]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    assert pretrain("first,second", root) == 0
    return root


def test_two_runs_with_one_seed_are_equal_to_the_last_bit(root):
    first, second = curve(root / "first"), curve(root / "second")
    assert len(first) == 8 and first == second
    assert len({row[0] for row in first}) == 8


def test_a_run_that_a_signal_stops_goes_on_as_if_it_had_not(root):
    assert pretrain("stopped", root, stop_at=4) == 85
    assert curve(root / "stopped") == curve(root / "first")[:4]
    assert not (root / "stopped" / "done.json").exists()
    assert pretrain("stopped", root) == 0
    assert curve(root / "stopped") == curve(root / "first")
    assert (root / "stopped" / "done.json").is_file()
