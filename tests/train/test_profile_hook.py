"""Profiles of real runs: which files a window of steps leaves, what traces name, and that losses stay the same."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_r1.config.cross_checks import check_layout
from megatron_r1.config.load import load
from megatron_r1.config.profile import ProfileConfig
from megatron_r1.errors import ConfigError
from megatron_r1.train.hooks.profile import ProfileHook, profile_hooks
from megatron_r1.train.state import TrainState

RUNS = """
import sys
from megatron_r1.__main__ import exit_code

for line in sys.stdin:
    assert exit_code([*line.split(), *sys.argv[1:]]) == 0, line
"""
COMMON = ("platform=cpu", "threads=1", "track=off", "model.num_layers=2", "train.schedule.warmup_steps=0")
PRETRAIN = (
    "pretrain data.num_documents=300 train.steps=4 train.sequence_length=32 train.global_batch_size=4 "
    "train.micro_batch_size=2"
)
COMMANDS = f"""
{PRETRAIN} root={{0}} name=plain
{PRETRAIN} root={{0}} name=traced profile.steps=2:3
grpo root={{0}} name=rl init.from={{0}}/plain rollout=local rollout.max_response_tokens=8 rl.prompts_per_rollout=4 \
rl.group_size=2 rl.updates_per_rollout=2 rl.kl_coefficient=0.1 model.mtp.num_layers=0 train.steps=2 profile.steps=2:2
"""


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def trace_of(run: Path, name: str) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = json.loads(
        gzip.decompress((run / "profile" / f"{name}.trace.json.gz").read_bytes())
    )["traceEvents"]
    return events


def ranges_of(events: list[dict[str, Any]]) -> dict[str, int]:
    """How often each named range is in a trace."""
    names = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    return {name: names.count(name) for name in names}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    command, lines = [sys.executable, "-W", "ignore", "-c", RUNS, *COMMON], COMMANDS.strip().format(root)
    done = subprocess.run(command, input=lines, capture_output=True, text=True, timeout=170, check=False)
    assert done.returncode == 0, done.stderr
    return root


def test_a_traced_run_has_the_losses_of_one_that_is_not(root):
    plain, traced = ([row["train/loss"].hex() for row in rows_of(root / name)] for name in ("plain", "traced"))
    assert len(plain) == 4 and plain == traced


def test_a_run_that_traces_nothing_writes_nothing(root):
    assert not (root / "plain" / "profile").exists()


def test_a_trace_names_the_passes_of_its_steps(root):
    """Two micro-batches a step, so four passes in two steps."""
    events = trace_of(root / "traced", "steps-2-3-rank-0")
    ranges = ranges_of(events)
    assert (ranges["forward"], ranges["backward"], ranges["all-grads-sync"]) == (4, 4, 2)
    assert [ranges[name] for name in ("step 2", "step 3", "update", "optimizer")] == [1, 1, 2, 2]
    assert "step 1" not in ranges and "step 4" not in ranges
    within = {event["name"] for event in events if event.get("cat") == "cpu_op"}
    assert {"aten::mm", "aten::_fused_adamw_"} <= within


def test_a_trace_of_reinforcement_learning_names_its_phases(root):
    ranges = ranges_of(trace_of(root / "rl", "steps-2-2-rank-0"))
    phases = {"weight_sync": 1, "rollout": 1, "rewards": 1, "log_probs": 1, "update": 2, "optimizer": 2}
    assert {name: ranges[name] for name in phases} == phases
    assert ranges["forward"] > ranges["backward"] > 1  # log-probs have forward passes alone


def test_a_table_names_the_operators_that_take_most(root):
    text = (root / "traced" / "profile" / "steps-2-3-rank-0.txt").read_text()
    time, memory = text.split("Operators that allocate most")
    assert "Operators that take most time" in time and "aten::mm" in time and "aten::mm" in memory
    resident = int(text.partition("Peak resident memory of the process: ")[2].partition(" MiB")[0])
    assert 100 < resident < 20_000


def test_a_run_that_stops_within_the_window_writes_what_it_has(tmp_path):
    hook = ProfileHook(tmp_path, ProfileConfig(steps="3:9"), rank=5, cuda=False)
    for step in (2, 3, 4):
        hook.before_step(TrainState(step=step - 1))
        torch.ones(3).add(1).cumsum(0)
        hook.after_step(TrainState(step=step), {})
    hook.finish(TrainState(step=4))
    hook.finish(TrainState(step=4))
    operators = [event["name"] for event in trace_of(tmp_path, "steps-3-4-rank-5") if event.get("cat") == "cpu_op"]
    assert operators.count("aten::cumsum") == 2
    assert len(list((tmp_path / "profile").iterdir())) == 2


def test_ranks_that_are_not_named_trace_nothing(tmp_path):
    settings = ProfileConfig(steps="1:2", ranks=[1, 3])
    assert [len(profile_hooks(tmp_path, settings, 2, rank, cuda=False)) for rank in range(4)] == [0, 1, 0, 1]
    assert profile_hooks(tmp_path, ProfileConfig(), 2, 0, cuda=False) == []
    with pytest.raises(ConfigError, match=r"profile.steps=1:2: must be within the 1 steps"):
        profile_hooks(tmp_path, settings, 1, 1, cuda=False)


@pytest.mark.parametrize("steps", ["10", "0:2", "3:2", "1-3", "a:b", "1:2:3"])
def test_steps_that_are_no_window_are_refused(steps):
    with pytest.raises(ConfigError) as refused:
        ProfileConfig(steps=steps)
    assert refused.value.key == "steps"


@pytest.mark.parametrize("ranks", [[], [-1], [0, 0]])
def test_ranks_that_are_none_are_refused(ranks):
    with pytest.raises(ConfigError) as refused:
        ProfileConfig(ranks=ranks)
    assert refused.value.key == "ranks"


def test_ranks_that_the_run_does_not_have_are_refused():
    overrides = ["profile.ranks=[0,2]", "parallel.expert=1"]
    check_layout(load("pretrain", overrides), "pretrain", 2)  # nothing is traced
    with pytest.raises(ConfigError, match="profile.ranks"):
        check_layout(load("pretrain", [*overrides, "profile.steps=1:2"]), "pretrain", 2)
