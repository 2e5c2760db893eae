"""The verb reward_model from a base model to a scorer: resumed bit for bit, evaluated, and used as it was trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_r1.checkpoint.sharded import WholeTensors
from megatron_r1.platform.ports import reserve_ports
from megatron_r1.rollout.journal import Journal
from megatron_r1.track.metrics import reproducible
from megatron_r1.track.record import read_metrics
from tests.support.fork_server import run_forked_to_the_end
from tests.support.recorded import unregistered

pytestmark = pytest.mark.timeout(400)
SUPPORT = Path(__file__).parents[1] / "support"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("reward-runs")
    run_forked_to_the_end(SUPPORT / "reward_runs.py", folder, seconds=300)
    return folder


@pytest.fixture(scope="module")
def found(folder) -> dict[str, Any]:
    return json.loads((folder / "found.json").read_text())


@pytest.fixture(scope="module")
def of_two_ranks(folder, found) -> list[dict[str, Any]]:
    """Results of support/ranks_scorers.py, by rank."""
    [port] = reserve_ports(1)
    run_forked_to_the_end(SUPPORT / "ranks_scorers.py", folder, port, ranks=2, seconds=300)
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


def rows(folder: Path, run: str) -> list[dict[str, Any]]:
    return [reproducible(row) for row in read_metrics(folder / run / "metrics.jsonl")]


def test_one_epoch_is_trained_and_validation_examples_are_evaluated(folder):
    whole = rows(folder, "whole")
    assert [row["step"] for row in whole] == [1, 2, 3, 4, 5, 6], "48 examples in batches of 8"
    assert [row["step"] for row in whole if "eval/accuracy" in row] == [4, 6]
    assert whole[-1]["train/epoch"] == 1.0
    assert whole[0]["train/score_loss"] == pytest.approx(0.693147, abs=1e-6)
    assert whole[-1]["train/reasoning_loss"] < whole[0]["train/reasoning_loss"]
    results = json.loads((folder / "whole" / "accuracy.json").read_text())
    assert results["items"] == 12
    assert results["accuracy"]["mean"] == whole[-1]["eval/accuracy"]
    assert results["length_baselines"]["tokens"]["mean"] == 0.5


def test_the_registry_lists_what_is_recorded(folder):
    for run, command in (("whole", "reward_model"), ("safety", "reward_model"), ("policy", "grpo")):
        assert unregistered(read_metrics(folder / run / "metrics.jsonl"), command) == []


def test_a_stopped_run_resumes_bit_for_bit(folder, found):
    assert "SIGTERM: stopped after step 3" in found["stopped"]
    assert rows(folder, "stopped") == rows(folder, "whole")
    for kind in ("model", "exp_avg", "exp_avg_sq"):
        one, other = (
            WholeTensors(folder / run / "checkpoints" / "step-00000006", kind) for run in ("whole", "stopped")
        )
        assert one.keys() == other.keys()
        assert "reward_head.weight" in one
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_scorer_scores_in_batches_as_alone(found):
    for run, name in (("whole", "helpfulness"), ("safety", "harmlessness")):
        scores = found["scores"][run]
        assert scores["name"] == name
        assert scores["together"] == pytest.approx(scores["alone"], rel=1e-4, abs=1e-6)
        assert scores["together"][0] != scores["together"][1]
        assert scores["draws_nothing"]


def test_helpfulness_reads_the_summary_and_harmlessness_everything(found):
    helpful, safe = found["scores"]["whole"], found["scores"]["safety"]
    assert helpful["thought"] == helpful["together"]
    assert safe["thought"][0] != safe["together"][0]
    assert safe["thought"][1] == safe["together"][1], "its reasoning is the same"
    assert all(0 < value < 1 for value in safe["together"]), "a probability"


def test_what_is_no_reward_model_is_refused(found):
    assert "must be a run of the verb reward_model" in found["scores"]["base"]
    divided = found["scores"]["divided"]
    assert divided.startswith("reward.helpfulness_model=") and "parallel.tensor=8: must divide" in divided


def test_reward_models_score_beside_a_policy(folder, found):
    scores = found["scores"]
    assert len(scores["beside"]) == 16
    for name, run, weight in (("helpfulness", "whole", 0.5), ("harmlessness", "safety", 2.0)):
        given = [parts[name] for parts in scores["beside"]]
        assert given == pytest.approx([weight * score for score in scores[f"{run} of the policy"]], rel=1e-4, abs=1e-6)
        assert len(set(given)) > 4
    row, _ = read_metrics(folder / "policy" / "metrics.jsonl")
    assert row["rollout/reward"] == pytest.approx(
        row["rollout/reward/helpfulness"] + row["rollout/reward/harmlessness"]
    )


@pytest.mark.dist
@pytest.mark.parametrize("layout", ["tp2", "pp2", "ep2"])
def test_two_ranks_score_as_one_does(found, of_two_ranks, layout):
    for run in ("whole", "safety"):
        expected = found["scores"][f"{run} of the policy"][:9]
        for rank in of_two_ranks:
            scores = rank[layout][run]
            assert scores["all"] == pytest.approx(expected, rel=1e-5, abs=1e-7)
            assert scores["one"] == pytest.approx(expected[:1], rel=1e-5, abs=1e-7)
        difference = max(abs(a - b) for a, b in zip(of_two_ranks[0][layout][run]["all"], expected, strict=True))
        print(f"{layout} {run}: largest difference of a score {difference:.1e}")


@pytest.mark.dist
def test_rollouts_ahead_are_scored_by_both_ranks_until_there_are_none(found, of_two_ranks):
    helpful, safe = (found["scores"][f"{run} of the policy"][:9] for run in ("whole", "safety"))
    expected = [0.5 * one + 2.0 * other for one, other in zip(helpful, safe, strict=True)]
    for rank in of_two_ranks:
        assert rank["ahead"] == pytest.approx(expected, rel=1e-5, abs=1e-7)
        assert rank["ended"] == "nobody is there"


@pytest.mark.dist
def test_two_ranks_train_on_responses_that_both_score(folder, of_two_ranks):
    """The in-process engine samples the same on one rank and on two, until the weights differ by rounding."""
    alone, shared = (Journal(folder / run / "rollouts").read(1) for run in ("policy", "policy-of-two"))
    assert [sample.text for sample in shared] == [sample.text for sample in alone]
    assert [sample.reward for sample in shared] == pytest.approx(
        [sample.reward for sample in alone], rel=1e-5, abs=5e-6
    )
    one, two = rows(folder, "policy"), rows(folder, "policy-of-two")
    assert [row["step"] for row in two] == [1, 2]
    assert two[0]["train/gradient_norm"] == pytest.approx(one[0]["train/gradient_norm"], rel=1e-3)
