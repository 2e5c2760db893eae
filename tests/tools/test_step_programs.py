"""The benchmarks of the training step in short: both sides compute the same thing and take turns."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tools.bench.pretrain_speed import Setting, parsed, task_of

ROOT = Path(__file__).resolve().parents[2]


def printed(*command: str) -> str:
    """What a program prints; it has processes or megatron-core's state of its own."""
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=True, timeout=280)
    print(done.stdout)
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_step_is_that_of_transformers():
    sizes = ["--batch=2", "--length=16", "--threads", "1", "--trials=1", "--rounds=1"]
    lines = printed("tools/bench/pretrain_speed.py", "tiny", *sizes).splitlines()
    assert sum(line.startswith("loss of step") for line in lines) == 2  # they agreed
    assert sum("tokens/s" in line for line in lines) == 2


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_step_is_that_of_a_bare_loop():
    assert "times the speed of bare loop" in printed("tools/bench/step_overhead.py", "--steps=5", "threads=1")


def test_tokens_are_drawn_by_step_and_what_one_side_lacks_is_off(tmp_path):
    given = parsed(["tiny", "--batch=3", "--length=8"])
    task = task_of(given.model, given.batch, given.length, tmp_path)
    assert task.rows(0).shape == (3, 9) and not task.rows(0).equal(task.rows(1)) and task.rows(1).equal(task.rows(1))
    moe = task.config.model.moe
    assert task.config.model.mtp.num_layers == moe.sequence_loss_coefficient == moe.bias_update_rate == 0
    assert [str(Setting(1)), str(Setting(2, "eager"))] == ["1 thread", "2 threads, eager"]
