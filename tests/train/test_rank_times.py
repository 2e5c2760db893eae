"""Time per phase over ranks: two ranks that run, of which one becomes slow, and the rule by which ranks are slow."""

from __future__ import annotations

import gzip
import json
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_r1.train.hooks.rank_times import OF_STEPS, RankTimes, metrics_over_ranks, phase_table, slow_ranks
from tests.conftest import SUPPORT
from tests.support.launching import run_to_the_end

SLOW_FROM = 7
"""A window of `train.log_interval` has two steps: 5 and 6 are even, 7 and 8 are slow."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 steps on two ranks; rank 1 works more from step 7 on."""
    folder = tmp_path_factory.mktemp("slow")
    launcher = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    run_to_the_end([*launcher, str(SUPPORT / "slow_rank.py"), str(folder), str(SLOW_FROM)], seconds=170)
    return folder / "run"


@pytest.fixture(scope="module")
def rows(run: Path) -> dict[int, dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return {(row := json.loads(line))["step"]: row for line in lines}


def test_a_slow_rank_is_named_with_its_host_once_after_two_windows(rows):
    """Never while the ranks are even."""
    named = {step: row["perf/stragglers"] for step, row in rows.items() if "perf/stragglers" in row}
    assert [*named] == [10]
    [(name, times)] = named[10].items()
    assert name == f"rank 1 on {socket.gethostname()}" and 1 / 0.7 < times <= 2.0


def test_the_log_names_it_once(run):
    log = (run / "logs" / "rank-00000.log").read_text()
    assert log.count("is slow") == 1 and f"rank 1 on {socket.gethostname()} is slow: in steps 9 to 10" in log


def test_rows_at_log_steps_have_the_spread_over_ranks(rows):
    for step, row in rows.items():
        assert ("perf/phase_seconds_max/update" in row) == ("perf/pass_seconds_max" in row) == (step % 2 == 0)
        if step % 2 == 0:
            for name in ("phase_seconds_{}/update", "phase_seconds_{}/optimizer", "pass_seconds_{}"):
                low, middle, high = (row[f"perf/{name.format(kind)}"] for kind in ("min", "median", "max"))
                assert 0 < low <= middle <= high
        if step % 2 == 0 and step > SLOW_FROM:
            assert row["perf/slowest_rank/update"] == 1
            assert row["perf/pass_seconds_max"] > 2 * row["perf/pass_seconds_min"]
            # Both are in the phase as long as the slow one.
            assert row["perf/phase_seconds_min/update"] > 0.5 * row["perf/pass_seconds_max"]


def test_the_log_ends_with_a_table_of_phases(run):
    log = (run / "logs" / "rank-00000.log").read_text()
    table = log[log.index("time of steps 1 to 12") :].splitlines()[1:]
    assert table[0].split() == ["phase", "s", "a", "step", "share", "min", "median", "max", "slowest", "rank"]
    update = next(line.split() for line in table if line.startswith("update"))
    assert update[-1] == "1" and float(update[2].rstrip("%")) > 50


def test_only_the_rank_that_was_named_traces(run):
    files = {path.name for path in (run / "profile").iterdir()}
    assert files == {f"steps-1-2-rank-1.{kind}" for kind in ("trace.json.gz", "txt")}
    trace = json.loads(gzip.decompress((run / "profile" / "steps-1-2-rank-1.trace.json.gz").read_bytes()))
    assert (trace["distributedInfo"]["rank"], trace["distributedInfo"]["world_size"]) == (1, 2)
    ranges = {event["name"] for event in trace["traceEvents"] if event.get("cat") == "user_annotation"}
    assert {"step 1", "step 2", "update", "forward", "backward", "all-grads-sync", "optimizer"} <= ranges


def rank(work: float, stage: int = 0, **seconds: float) -> RankTimes:
    return RankTimes(stage, seconds, {"update": work})


def test_a_rank_is_slow_by_the_median_of_its_pipeline_stage():
    ranks = [rank(1.0), rank(1.1), rank(1.5), rank(0.9), rank(2.0, 1), rank(2.1, 1), rank(2.0, 1), rank(3.1, 1)]
    slow = slow_ranks(ranks, 0.7)
    assert slow == {7: pytest.approx(3.1 / 2.05)}
    assert slow_ranks(ranks, 0.75) == {2: pytest.approx(1.5 / 1.05), 7: pytest.approx(3.1 / 2.05)}
    assert slow_ranks(ranks, 0.0) == {}


def test_ranks_without_passes_are_not_slow():
    assert slow_ranks([RankTimes(0), RankTimes(0)], 0.7) == {}
    assert slow_ranks([RankTimes(0), RankTimes(0), rank(1.0)], 0.7) == {}  # the median worked for no time


def test_numbers_travel_and_come_back():
    times = RankTimes(3, {"rollout": 1.5, "update": 0.25}, {"update": 0.2})
    back = RankTimes.of_numbers(times.numbers())
    assert back.stage == 3 and back.seconds == dict.fromkeys(OF_STEPS, 0.0) | {"rollout": 1.5, "update": 0.25}
    assert back.work == dict.fromkeys(OF_STEPS, 0.0) | {"update": 0.2}


def test_the_spread_is_of_one_step_and_names_the_slowest():
    ranks = [rank(1.0, update=6.0, rollout=4.0), rank(3.0, update=6.1, rollout=1.0), rank(2.0, update=6.0, rollout=1.0)]
    found = dict(metrics_over_ranks(ranks, 2))
    assert found == {
        "perf/phase_seconds_min/update": 3.0,
        "perf/phase_seconds_median/update": 3.0,
        "perf/phase_seconds_max/update": 3.05,
        "perf/slowest_rank/update": 1,
        "perf/phase_seconds_min/rollout": 0.5,
        "perf/phase_seconds_median/rollout": 0.5,
        "perf/phase_seconds_max/rollout": 2.0,
        "perf/slowest_rank/rollout": 0,
        "perf/pass_seconds_min": 0.5,
        "perf/pass_seconds_median": 1.0,
        "perf/pass_seconds_max": 1.5,
    }


def test_the_table_of_one_rank_has_no_spread():
    assert phase_table([rank(1.0, update=6.0, step=2.0)], 4).splitlines() == [
        "phase         s a step   share",
        "update           1.500   75.0%",
        "step             0.500   25.0%",
    ]
