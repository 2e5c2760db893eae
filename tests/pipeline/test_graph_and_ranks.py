"""The order of stages, their command lines, and the ranks of a stage as processes."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_r1.config.parallel import ParallelConfig
from megatron_r1.config.pipeline import StageConfig
from megatron_r1.errors import ConfigError
from megatron_r1.pipeline.graph import in_order, stage_command
from megatron_r1.pipeline.ranks import run_ranks


def stage(*needs: str, **settings) -> StageConfig:
    return StageConfig(verb="pretrain", needs=list(needs), **settings)


def test_a_stage_runs_after_what_it_needs():
    assert in_order({"c": stage("a", "b"), "b": stage("a"), "a": stage()}) == ["a", "b", "c"]


def test_a_circle_is_refused():
    with pytest.raises(ConfigError, match="circle"):
        in_order({"a": stage("b"), "b": stage("a")})


def test_a_stage_finds_the_runs_of_others_and_the_users_overrides_come_last():
    settings = stage("base", config="r1_zero", overrides=["init.from='{base}'", "seed=1"])
    command = stage_command("rl", settings, Path("runs/x"), ["seed=2"])
    assert command == [
        *("pretrain", "--config-name", "r1_zero", "root='runs/x'", "name=rl"),
        *("init.from='runs/x/base'", "seed=1", "seed=2"),
    ]


@pytest.mark.parametrize(
    ("degrees", "ranks"),
    [
        ({}, 1),
        ({"tensor": 2}, 2),
        ({"expert": 2}, 2),
        ({"tensor": 2, "expert": 2}, 2),
        ({"pipeline": 2, "tensor": 2}, 4),
    ],
)
def test_a_stage_takes_as_few_ranks_as_its_degrees_need(degrees, ranks):
    assert ParallelConfig(**degrees).fewest_ranks() == ranks


def test_the_first_failing_ranks_code_comes_back_and_no_rank_is_left(monkeypatch):
    monkeypatch.setattr("megatron_r1.pipeline.ranks.GRACE_S", 0.5)
    program = "import os, sys, time; time.sleep(60) if os.environ['RANK'] == '0' else sys.exit(85)"
    started = time.monotonic()
    assert run_ranks([sys.executable, "-c", program], 2) == 85
    assert time.monotonic() - started < 20
    assert not [child for child in psutil.Process().children() if "time.sleep(60)" in " ".join(child.cmdline())]


def test_ranks_are_numbered(tmp_path):
    program = f"import os; open(r'{tmp_path}/' + os.environ['RANK'] + os.environ['WORLD_SIZE'], 'w')"
    assert run_ranks([sys.executable, "-c", program], 3) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["03", "13", "23"]
