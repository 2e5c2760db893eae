"""Pre-training from the command line: the same seed gives the same run to the last bit, stopped half way or not.

The run has every schedule by consumed tokens, and stops where they are all under way.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_r1.checkpoint.store import newest_verified
from megatron_r1.runs.initial_weights import find_weights

DRIVER = """
import os, signal, sys
from megatron_r1.__main__ import exit_code
from megatron_r1.data.pretraining.corpus import Corpus

names, stop_at = sys.argv[1].split(","), int(sys.argv[2])
batch, taken = Corpus.batch, []

def batch_or_signal(self, position, count):
    taken.append(position)
    if len(taken) == stop_at:
        os.kill(os.getpid(), signal.SIGUSR1)
    return batch(self, position, count)

Corpus.batch = batch_or_signal
sys.exit(max(exit_code(["pretrain", f"name={name}", *sys.argv[3:]]) for name in names))
"""
SETTINGS = [
    "platform=cpu", "threads=1", "track=off", "seed=3", "data.num_documents=2000", "model.num_layers=2",
    "model.init_std=0.02", "train.steps=8", "train.sequence_length=64", "train.global_batch_size=4",
    "train.micro_batch_size=2", "train.schedule.warmup_steps=2", "train.save_interval=100",
    "train.log_interval=1", "train.balance_window=3", "train.ema_decay=0.5",
    "train.schedule={learning_rate:3e-3,min_learning_rate:1e-4,lr_decay_style:tokens,learning_rate_phases:["
    "{until:600,value:3e-3},{until:1400,value:1e-4,shape:cosine}],"
    "batch_ramp:{start:2,increment:2,tokens:600},"
    "mtp_weight_phases:[{until:700,value:0.3},{until:900,value:0.1}],"
    "bias_rate_phases:[{until:1000,value:1e-2},{until:1500,value:0.0}]}",
]  # fmt: skip


IN_BACKGROUND = ["train.async_save=true", "train.save_interval=1"]


def pretrain(names: str, root: Path, *more: str, stop_at: int = -1) -> int:
    """Exit code of runs, one after the other in one process; `stop_at` steps are done when the signal comes."""
    command = [sys.executable, "-W", "ignore", "-c", DRIVER, names, str(stop_at), *SETTINGS, f"root={root}", *more]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode in (0, 85), done.stderr
    return done.returncode


METRICS = (
    *(
        "train/loss",
        "train/mtp_loss",
        "train/gradient_norm",
        "train/learning_rate",
        "train/batch_size",
        "train/mtp_weight",
        "moe/bias_rate",
    ),
    *("train/consumed_tokens", "moe/load_max", "moe/max_violation", "moe/mtp_max_violation"),
)


def rows_of(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return rows


def curve(folder: Path) -> list[list[str]]:
    return [[float(row[key]).hex() for key in METRICS] for row in rows_of(folder)]


def saved_state(folder: Path) -> dict[str, bytes]:
    """The newest checkpoint's tensor files: model, optimizer, moving average, window of loads."""
    checkpoint, _ = newest_verified(folder / "checkpoints")
    return {path.name: path.read_bytes() for path in checkpoint.glob("[!r]*.safetensors")}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    assert pretrain("first,second", root) == 0
    return root


def test_two_runs_with_one_seed_are_equal_to_the_last_bit(root):
    first, second = curve(root / "first"), curve(root / "second")
    assert len(first) == 8 and first == second
    assert len({row[0] for row in first}) == 8


def test_every_schedule_is_followed(root):
    rows = rows_of(root / "first")
    sequences = [2, 2, 2, 2, 2, 4, 4, 4]
    assert [row["train/batch_size"] for row in rows] == sequences
    consumed = [64 * sum(sequences[:step]) for step in range(9)]
    assert [row["train/consumed_tokens"] for row in rows] == consumed[1:]
    assert [row["train/mtp_weight"] for row in rows] == [0.3 if tokens < 700 else 0.1 for tokens in consumed[:-1]]
    assert [row["moe/bias_rate"] for row in rows] == [1e-2 if tokens < 1000 else 0.0 for tokens in consumed[:-1]]
    cosines = [1e-4 + 1.45e-3 * (1 + math.cos(math.pi * (tokens - 600) / 800)) for tokens in consumed[5:8]]
    rates = [1.5e-3, 3e-3, 3e-3, 3e-3, 3e-3, *cosines]
    assert [row["train/learning_rate"] for row in rows] == pytest.approx(rates, rel=1e-12)
    assert set(rows[-1]["moe/load"]) == {"layer 2", "mtp 1"}


def test_the_moving_average_is_a_model_of_its_own(root):
    model, ema = (find_weights(str(root / "first"), which=which) for which in ("model", "ema"))
    assert model.tensors.keys() == ema.tensors.keys()
    name = "output_layer.weight"
    distance = (model.tensors[name] - ema.tensors[name]).norm() / model.tensors[name].norm()
    assert 0 < distance < 0.1


def test_a_run_that_a_signal_stops_resumes_as_if_undisturbed(root):
    """And as if every step's checkpoint had not been written beside the next steps."""
    assert pretrain("stopped", root, *IN_BACKGROUND, stop_at=6) == 85
    assert curve(root / "stopped") == curve(root / "first")[:6]
    assert not (root / "stopped" / "done.json").exists()
    assert pretrain("stopped", root, *IN_BACKGROUND) == 0
    assert curve(root / "stopped") == curve(root / "first")
    assert (root / "stopped" / "done.json").is_file()
    stopped, first = saved_state(root / "stopped"), saved_state(root / "first")
    assert first.keys() == {f"{kind}-00000.safetensors" for kind in ("model", "exp_avg", "exp_avg_sq", "ema", "extra")}
    assert stopped == first
