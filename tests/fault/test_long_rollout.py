"""A rollout that takes longer than a collective operation may does not end the job."""

from __future__ import annotations

import json
import sys

import pytest

from megatron_r1.runs.folder import is_done
from megatron_r1.track.record import read_metrics
from tests.support.launching import run_to_the_end
from tests.support.long_rollout import COLLECTIVE_S, ROLLOUT_S


@pytest.mark.dist
def test_ranks_wait_for_a_rollout_longer_than_any_collective_operation(tmp_path):
    """By the verb grpo with the engine in the process: rank 1 waits for rank 0."""
    assert ROLLOUT_S > COLLECTIVE_S + 2
    run_to_the_end([sys.executable, "-W", "ignore", "-m", "tests.support.long_rollout", str(tmp_path)], seconds=110)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["slept"] and found["codes"] == {"0": 0, "1": 0}, found["logs"]
    rows = read_metrics(tmp_path / "long" / "metrics.jsonl")
    assert is_done(tmp_path / "long") and [row["step"] for row in rows] == [1, 2]
    assert rows[1]["perf/phase_seconds/rollout"] >= ROLLOUT_S
