"""Seconds of reinforcement learning: rollout, sync, in turns and ahead, and the division of nodes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import orjson
import pytest

from megatron_r1.__main__ import exit_code
from megatron_r1.config.hardware import GPUS
from megatron_r1.config.load import load
from megatron_r1.plan.constants import Constants
from megatron_r1.plan.job import TrainingJob
from megatron_r1.plan.published_rl import ROLLOUTS
from megatron_r1.plan.rollout import (
    Responses,
    ServerGpus,
    decode_seconds,
    engines_of,
    rl_step,
    rollout_seconds,
    sync_seconds,
)
from megatron_r1.rollout.sync.payload import WeightPayload

CONSTANTS, H100 = Constants(), GPUS["H100"]
QWEN = ["model=qwen2_5_7b", "init.from=x", "rollout.max_response_tokens=4096", "model.max_sequence_length=8192",
        "rl.tokens_per_micro_batch=8192", "rollout.sglang.max_total_tokens=0"]  # fmt: skip


def test_lengths_have_the_mean_and_the_longest_that_are_given() -> None:
    found = Responses(64, 1000, 3000, 100).lengths()
    assert sum(found) / len(found) == pytest.approx(1000, rel=0.01) and max(found) <= 3000
    assert found == sorted(found) and found[0] < 500


def test_a_small_batch_takes_the_time_of_reading_the_weights() -> None:
    config = load("grpo", QWEN)
    one = decode_seconds(config, H100, ServerGpus(1, 1), 1, 100, CONSTANTS)
    launches = 30 * 28 * CONSTANTS.launch * 0.1
    assert one == pytest.approx(7.6e9 * 2 / (CONSTANTS.memory * 3.35e12) + launches, rel=0.05)
    many = decode_seconds(config, H100, ServerGpus(1, 1), 64, 8000, CONSTANTS)
    cache = 64 * 8000 * 28 * 2 * 4 * 128 * 2 / (CONSTANTS.memory * 3.35e12)
    assert many - one == pytest.approx(cache + 2 * 7.6e9 * 63 / (CONSTANTS.matrix * 989.4e12), rel=0.05)


def test_a_rollout_waits_for_its_longest_response() -> None:
    config = load("grpo", QWEN)
    even = Responses(64, 1000, 1000, 100)
    long = replace(even, longest=4000)
    engines = ServerGpus(8, 1)
    assert rollout_seconds(config, H100, engines, long, CONSTANTS) > 2 * rollout_seconds(
        config, H100, engines, even, CONSTANTS
    )
    assert rollout_seconds(config, H100, ServerGpus(16, 1), even, CONSTANTS) < rollout_seconds(
        config, H100, engines, even, CONSTANTS
    )


@pytest.mark.parametrize("model", ["v3_671b", "qwen2_5_7b"])
def test_sync_sends_as_many_bytes_as_the_weights_have(model: str) -> None:
    config = load("grpo", [*QWEN, f"model={model}"])
    payload = WeightPayload(config.model)
    nbytes = sum(entry.nbytes for name in payload.names() for entry in payload.entries(name))
    assert sync_seconds(config, H100, CONSTANTS) * CONSTANTS.link * H100.network == pytest.approx(nbytes, rel=0.01)


def test_ahead_a_step_takes_the_longer_of_sampling_and_training() -> None:
    config = load("grpo", QWEN)
    job = TrainingJob(config, H100, 8)
    turns = rl_step(job, ServerGpus(8, 1), CONSTANTS)
    ahead = replace(turns, ahead=True)
    assert ahead.total == max(turns.rollout, turns.training) + turns.sync < turns.total
    assert 0 < ahead.trainer_idle < turns.trainer_idle < 1 and ahead.engine_idle < turns.engine_idle


def test_servers_are_as_small_as_their_weights_allow() -> None:
    """V3 in bf16 has 1.34 TB."""
    large = load("grpo", [*QWEN, "model=v3_671b"])
    assert engines_of(load("grpo", QWEN), H100, 64).tensor == 1
    assert engines_of(large, H100, 64).tensor == 32 and engines_of(large, GPUS["H200"], 64).tensor == 16


def test_no_prediction_exceeds_a_published_bound_or_mean() -> None:
    """The model has what the hardware allows; trainers of 2026 take 2 to 6 times as long (README.md)."""
    assert len(ROLLOUTS) == 8
    for row in ROLLOUTS:
        assert 0.1 * row.seconds * (not row.bound) < row.predicted(CONSTANTS).total < row.seconds, row.name


def test_a_plan_divides_the_nodes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [*QWEN, "gpu=h100", "gpus=32", f"root={tmp_path}", "name=rl"]
    assert exit_code(["plan", "grpo", *command]) == 0
    plan = orjson.loads((tmp_path / "rl/plan/plan.json").read_bytes())
    found = plan["reinforcement"]
    assert 1 <= found["engine_nodes"] <= 3 and plan["nodes"] == 4
    assert f"engine_nodes={found['engine_nodes']}" in plan["submit"]
    phases = found["phases"]
    alone = phases["rollout"] + phases["rewards"] + phases["logprobs"] + phases["update"] + phases["sync"]
    assert found["step_seconds"] == pytest.approx(alone)
    assert "weight sync" in capsys.readouterr().out


def test_where_no_trainer_fits_the_plan_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["model=v3_671b", *QWEN[1:], "gpu=h100", "gpus=32", f"root={tmp_path}", "parallel.expert=8"]
    assert exit_code(["plan", "grpo", *command]) == 2
    refused = [*QWEN, "gpu=h100", "gpus=16", f"root={tmp_path}", "rollout.max_response_tokens=8192"]
    assert exit_code(["plan", "grpo", *refused]) == 2  # by a rule that no layout satisfies
    shown = capsys.readouterr()
    assert "must be below model.max_sequence_length=8192" in shown.err
    assert "GB where 79 are" in " ".join(shown.out.split())
