"""A real server tells which experts it took, and a trainer in bf16 that takes them comes much closer to it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).resolve().parents[2] / "tools" / "bench" / "routing_replay.py"


@pytest.mark.sglang
@pytest.mark.timeout(200)
def test_replay_at_least_halves_the_difference():
    command = [sys.executable, "-W", "ignore", str(PROGRAM), "--seeds=1", "--layers=6", "--tokens=24"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    means = {mode: float(mean) for mode, mean in re.findall(r"replay (on|off): mean ([\d.]+)", done.stdout)}
    assert means["on"] < means["off"] / 2, done.stdout
    match = re.search(r"(\d+) of (\d+) choices", done.stdout)
    assert match, done.stdout
    otherwise, choices = map(int, match.groups())
    assert 0 < otherwise < choices / 10
