"""Runs with a critic: gone on with bit for bit, and started from a reward model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import run_to_the_end

from megatron_r1.checkpoint.sharded import WholeTensors
from megatron_r1.track.record import read_metrics

pytestmark = pytest.mark.timeout(240)
SUPPORT = Path(__file__).parents[1] / "support"
POLICY = {"model", "exp_avg", "exp_avg_sq", "reference"}
CRITIC = {"critic", "critic_exp_avg", "critic_exp_avg_sq", "critic_progress"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ppo-runs")
    run_to_the_end([sys.executable, str(SUPPORT / "ppo_runs.py"), str(folder)], seconds=200)
    return folder


@pytest.fixture(scope="module")
def found(folder) -> dict[str, Any]:
    return json.loads((folder / "found.json").read_text())


def rows(folder: Path, run: str) -> list[dict[str, Any]]:
    timed = ("seconds", "idle", "time")
    return [
        {key: value for key, value in row.items() if not key.endswith(timed)}
        for row in read_metrics(folder / run / "metrics.jsonl")
    ]


def tensors(folder: Path, run: str, kind: str, step: int = 2) -> dict[str, torch.Tensor]:
    return dict(WholeTensors(folder / run / "checkpoints" / f"step-{step:08}", kind))


def test_a_stopped_run_goes_on_bit_for_bit(folder, found):
    assert "SIGTERM: stopped after step 1" in found["stopped"]
    assert len(rows(folder, "whole")) == 2 and rows(folder, "stopped") == rows(folder, "whole")
    for kind in POLICY | CRITIC:
        one, other = (tensors(folder, run, kind) for run in ("whole", "stopped"))
        assert one and one.keys() == other.keys(), kind
        assert all(torch.equal(one[name], other[name]) for name in one), kind
    assert tensors(folder, "whole", "critic_progress")["updates"].tolist() == [4]


def test_a_critic_starts_from_the_policy_and_learns_apart_from_it(folder):
    base, critic, policy = (
        tensors(folder, run, kind, step)
        for run, kind, step in (("base", "model", 1), ("whole", "critic", 2), ("whole", "model", 2))
    )
    untouched = {name for name in base if torch.equal(base[name], critic[name])}
    assert critic.keys() - base.keys() == {"reward_head.weight", "reward_head.bias"}
    assert "output_layer.weight" in untouched and "embedding.word_embeddings.weight" not in untouched
    assert critic["reward_head.weight"].any() and not torch.equal(
        policy["output_layer.weight"], base["output_layer.weight"]
    )
    row = rows(folder, "whole")[-1]
    assert row["value_loss"] > 0 and row["value_gradient_norm"] > 0 and row["kl_in_reward"] != 0


def test_a_critic_starts_from_a_reward_model(folder, found):
    judge, critic = tensors(folder, "judge", "model"), tensors(folder, "judged", "critic", 1)
    assert judge.keys() == critic.keys() and judge["reward_head.weight"].any()
    for name, tensor in judge.items():
        torch.testing.assert_close(critic[name], tensor, rtol=0, atol=1e-9)
    assert "rl.critic.init_from=" in found["no_reward_model"]
    assert "must be a run of the verb reward" in found["no_reward_model"]
