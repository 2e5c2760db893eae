"""Reinforcement learning with a real server that samples while the trainer learns."""

from __future__ import annotations

import json

import pytest
from jobs import COMMON, Job, run_alone

from megatron_r1.rl.loop import tokens_by_version
from megatron_r1.rollout.journal import Journal

STEPS, AHEAD = 6, 2
SMALL = ["train.sequence_length=32", "train.global_batch_size=2", "train.micro_batch_size=2"]
GRPO = [
    "rollout.max_response_tokens=24", "rl.prompts_per_rollout=4", "rl.group_size=4", "rl.mini_batches=2",
    "rollout.sglang.max_total_tokens=4096", "rollout.sglang.max_running_requests=16",
]  # fmt: skip


@pytest.mark.sglang
@pytest.mark.timeout(200)
def test_no_token_is_staler_than_allowed_and_prompts_keep_their_order(tmp_path):
    base = Job(["pretrain", *COMMON, *SMALL, "train.steps=3"], tmp_path, "base")
    assert (done := run_alone(base)).returncode == 0, done.stderr
    ahead = [f"rollout.ahead={AHEAD}", "rollout.pause=retract", f"init.from='{tmp_path}/base'"]
    often = ["train.checkpoint_interval=1", f"train.keep_checkpoints={STEPS}"]  # a rollout's weights can be compared
    job = Job(["grpo", *COMMON, f"train.steps={STEPS}", *GRPO, *ahead, *often], tmp_path, "ahead")
    assert (done := run_alone(job)).returncode == 0, done.stderr
    assert len(job.rows) == STEPS
    journal = Journal(job.folder / "rollouts")
    for step, row in enumerate(job.rows, start=1):
        samples = journal.read(step)
        versions = [int(version) for sample in samples for version, _ in tokens_by_version(sample)]
        assert row["staleness"] == step - 1 - min(versions) <= AHEAD and max(versions) <= step - 1
        assert row["mean_staleness"] <= row["staleness"]
        assert row["continued"] == sum(bool(sample.later_versions) for sample in samples) / len(samples)
        assert 0 <= row["trainer_idle"] <= 1 and 0 <= row["engine_idle"] <= 1
        assert list(dict.fromkeys(s.prompt_id for s in samples)) == [f"train-{4 * (step - 1) + i}" for i in range(4)]
    assert max(row["staleness"] for row in job.rows) > 0
    # The engine's own log-probabilities are those of the weights that it had: a rollout ago they were the trainer's.
    assert job.rows[0]["logprob_gap"] < 1e-4
    asked = Job(["diagnose", *COMMON, f"init.from='{tmp_path}/ahead'"], tmp_path, "diagnosis")
    assert (done := run_alone(asked)).returncode == 0, done.stderr
    assert "engine and trainer agree" in json.loads((asked.folder / "diagnosis.json").read_text())["verdict"]
    wrong = Job(["diagnose", *COMMON, "rollout.temperature=0.8", f"init.from='{tmp_path}/ahead'"], tmp_path, "wrong")
    assert (done := run_alone(wrong)).returncode == 0, done.stderr
    verdict = json.loads((wrong.folder / "diagnosis.json").read_text())["verdict"]
    assert verdict.startswith("temperature: that the engine sampled at 1 explains") and verdict in done.stderr
    assert "<svg" in (wrong.folder / "diagnosis.svg").read_text()
