"""Reinforcement learning with a real server that samples while the trainer learns."""

from __future__ import annotations

import pytest
from jobs import COMMON, Job, run_alone

from megatron_r1.rollout.journal import Journal

STEPS = 4
SMALL = ["train.sequence_length=32", "train.global_batch_size=2", "train.micro_batch_size=2"]
GRPO = [
    "rollout.max_response_tokens=24", "rl.prompts_per_rollout=4", "rl.group_size=4", "rl.mini_batches=2",
    "rollout.sglang.max_total_tokens=4096", "rollout.sglang.max_running_requests=16",
]  # fmt: skip


@pytest.mark.sglang
@pytest.mark.timeout(200)
def test_answers_are_never_older_than_one_step(tmp_path):
    base = Job(["pretrain", *COMMON, *SMALL, "train.steps=3"], tmp_path, "base")
    assert (done := run_alone(base)).returncode == 0, done.stderr
    settings = ["grpo", *COMMON, f"train.steps={STEPS}", *GRPO, "rollout.ahead=1", f"init.from='{tmp_path}/base'"]
    job = Job(settings, tmp_path, "ahead")
    assert (done := run_alone(job)).returncode == 0, done.stderr
    assert [row["staleness"] for row in job.rows] == [0, 1, 1, 1]
    journal = Journal(job.folder / "rollouts")
    versions = [{sample.weight_version for sample in journal.read(step)} for step in range(1, STEPS + 1)]
    assert versions == [{"0"}, {"0"}, {"1"}, {"2"}]
    prompts = [sample.prompt_id for step in range(1, STEPS + 1) for sample in journal.read(step)]
    assert list(dict.fromkeys(prompts)) == [f"train-{number}" for number in range(4 * STEPS)]
    # The engine's own log-probabilities are those of the weights that it had: a rollout ago they were the trainer's.
    assert job.rows[0]["logprob_gap"] < 1e-4
