"""An unreachable wandb delays no step, and a killed run that resumes has one row per step, in record and wandb file."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import pytest

from megatron_r1.config.jobs import TrackConfig
from megatron_r1.track import wandb_run
from megatron_r1.track.record import read_metrics
from megatron_r1.track.tracker import Tracker
from tests.support.tracked_steps import STATES, server_in
from tests.track.test_tracker import own_home, wandb_rows

__all__ = ["own_home"]  # wandb's settings stay inside the test's folder
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("state", ["closed port", "black hole"])
def test_an_unreachable_server_delays_no_step(tmp_path, monkeypatch, state):
    """Rows go on while the start hangs, fails and falls back: a call that waited for it would take seconds."""
    import wandb

    assert wandb.__version__
    monkeypatch.setattr(wandb_run, "START_TIMEOUT_S", 3.0)
    monkeypatch.setattr(wandb_run, "FINISH_TIMEOUT_S", 3.0)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    with server_in(state) as url:
        monkeypatch.setenv("WANDB_BASE_URL", url)
        began = time.monotonic()
        tracker = Tracker(tmp_path / "run", {}, "run", TrackConfig(wandb="online"), "pretrain")
        inside = time.monotonic() - began
        step = 0
        while time.monotonic() - began < 4.5:
            step += 1
            before = time.monotonic()
            tracker.log(step, {"train/loss": 1.0 / step})
            inside += time.monotonic() - before
            time.sleep(0.02)
        tracker.close()
    assert inside < 1.5, f"{step} steps waited {inside:.1f} s for wandb"
    rows, _ = wandb_rows(tmp_path / "run", step)
    assert [row["step"] for row in rows] == list(range(1, step + 1))
    assert rows == read_metrics(tmp_path / "run" / "metrics.jsonl")


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_step_time_with_an_unreachable_server(tmp_path):
    """Real steps of `pretrain`, in turns within one process; the medians of each round are compared.

    On a machine that other programs slow down, wall-clock ratios are noise. The tracker's own share of a step, and the
    processor time of wandb's threads beside that of the thread that trains, bound there too what a step takes longer.
    """
    command = [sys.executable, "-m", "tests.support.tracked_steps", str(tmp_path), "4", "30"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1400, check=True)
    rounds: dict[str, list[dict[str, float]]] = json.loads(done.stdout.splitlines()[-1])
    for state in STATES:
        pairs = zip(rounds[state], rounds["disabled"], strict=True)
        ratio = sorted(here["step"] / base["step"] for here, base in pairs)
        tracker = median(here["tracker"] / here["step"] for here in rounds[state])
        threads = median(here["others"] / here["training"] for here in rounds[state])
        print(f"{state}: tracker {tracker:.5f}, threads {threads:.5f} of a step")
        print(f"  a step, of one without wandb: {median(ratio):.3f} ({ratio[0]:.3f} to {ratio[-1]:.3f})")
        assert tracker + threads < 0.05


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_killed_between_row_and_checkpoint_has_each_step_once(tmp_path):
    """Killed by SIGKILL three times, each time after a row that no checkpoint holds."""
    arguments = [
        *("pretrain", f"root={tmp_path}", "name=run", "platform=cpu", "threads=1", "track.wandb=offline"),
        *("train.steps=30", "train.save_interval=4", "train.schedule.warmup_steps=2", "data.num_documents=2000"),
    ]
    record = tmp_path / "run" / "metrics.jsonl"
    last = 0
    for _ in range(3):
        run = subprocess.Popen([sys.executable, "-m", "megatron_r1", *arguments], cwd=ROOT)
        deadline = time.monotonic() + 150
        while last % 4 != 2 or last <= 4:
            assert run.poll() is None and time.monotonic() < deadline
            last = read_metrics(record)[-1]["step"] if read_metrics(record) else 0
        os.kill(run.pid, signal.SIGKILL)
        run.wait()
        last = 0
    subprocess.run([sys.executable, "-m", "megatron_r1", *arguments], cwd=ROOT, check=True, timeout=200)
    rows, ids = wandb_rows(tmp_path / "run", 30)
    assert [row["step"] for row in rows] == list(range(1, 31)) == [row["step"] for row in read_metrics(record)]
    assert len(ids) == 1
