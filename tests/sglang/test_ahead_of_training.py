"""Reinforcement learning with a real server that samples while the trainer learns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_r1.config.keys import only_read
from megatron_r1.config.load import load
from megatron_r1.config.parallel import ParallelConfig
from megatron_r1.data.prompts.prompts import TrainingPrompts
from megatron_r1.platform import Platform
from megatron_r1.rl.loop import tokens_by_version
from megatron_r1.rollout.journal import Journal
from tests.support.jobs import COMMON, Job, end_of, launched, run_alone

STEPS, AHEAD = 6, 2
SMALL = ["train.sequence_length=32", "train.global_batch_size=2", "train.micro_batch_size=2"]
GRPO = [
    "rollout.max_response_tokens=24", "rl.prompts_per_rollout=4", "rl.group_size=4", "rl.updates_per_rollout=2",
    "rollout.sglang.max_total_tokens=4096", "rollout.sglang.max_running_requests=16",
]  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A run that has just learned something."""
    folder = tmp_path_factory.mktemp("base")
    job = Job(["pretrain", *COMMON, *SMALL, "data.num_documents=2000", "train.steps=3"], folder, "base")
    assert (done := run_alone(job)).returncode == 0, done.stderr
    return job.folder


@pytest.fixture(scope="module")
def judge(base) -> Path:
    """A reward model of the same shape."""
    items = ["reward_model.num_examples=32", "reward_model.eval_examples=4", "train.global_batch_size=8"]
    rate = ["train.micro_batch_size=8", "train.schedule.warmup_steps=1", "train.schedule.learning_rate=1e-2"]
    job = Job(
        ["reward_model", *only_read("reward_model", COMMON), *items, *rate, f"init.from='{base}'"], base.parent, "judge"
    )
    assert (done := run_alone(job)).returncode == 0, done.stderr
    return job.folder


def ahead_of(base: Path, judge: Path) -> list[str]:
    """Rollouts ahead of a policy's training, scored by a reward model too."""
    scored = ["reward.helpfulness=0.5", f"reward.helpfulness_model='{judge}'"]
    return [f"rollout.max_staleness={AHEAD}", "rollout.weight_sync.pause_mode=retract", f"init.from='{base}'", *scored]


def check_scores(job: Job, judge: Path, platform: Platform) -> None:
    """The reward model's part of each reward is what it says on one rank that does nothing else."""
    from megatron_r1.preference.scorer import RewardModelScorer

    journal = Journal(job.folder / "rollouts")
    samples = [sample for step in journal.steps() for sample in journal.read(step)]
    world = TrainingPrompts(load("grpo", ["data.num_documents=2000"]).data)
    prompts = [world.at(int(sample.prompt_id.removeprefix("train-"))) for sample in samples]
    alone = RewardModelScorer(str(judge), ParallelConfig(), platform)
    expected = [0.5 * value for value in alone.score(prompts, [sample.text for sample in samples])]
    assert [sample.reward_parts["helpfulness"] for sample in samples] == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert len({round(value, 4) for value in expected}) > 4


@pytest.mark.sglang
@pytest.mark.timeout(200)
def test_no_token_is_staler_than_allowed_and_prompts_keep_their_order(base, judge, one_rank, tmp_path):
    ahead = ahead_of(base, judge)
    often = ["train.save_interval=1", f"train.save_total_limit={STEPS}"]  # a rollout's weights can be compared
    job = Job(["grpo", *only_read("grpo", COMMON), f"train.steps={STEPS}", *GRPO, *ahead, *often], tmp_path, "ahead")
    assert (done := run_alone(job)).returncode == 0, done.stderr
    assert len(job.rows) == STEPS
    journal = Journal(job.folder / "rollouts")
    assert journal.steps() == [*range(2, STEPS + 1)]  # those since the oldest checkpoint
    for step, row in enumerate(job.rows[1:], start=2):
        samples = journal.read(step)
        versions = [int(version) for sample in samples for version, _ in tokens_by_version(sample)]
        assert row["rollout/staleness_max"] == step - 1 - min(versions) <= AHEAD and max(versions) <= step - 1
        assert row["rollout/staleness_mean"] <= row["rollout/staleness_max"]
        assert row["rollout/multi_version"] == sum(bool(sample.version_changes) for sample in samples) / len(samples)
        assert 0 <= row["perf/trainer_idle"] <= 1 and 0 <= row["perf/engine_idle"] <= 1
        assert list(dict.fromkeys(s.prompt_id for s in samples)) == [f"train-{4 * (step - 1) + i}" for i in range(4)]
    assert max(row["rollout/staleness_max"] for row in job.rows) > 0
    check_scores(job, judge, one_rank)
    # The engine's own log-probabilities are those of the weights that it had: a rollout ago they were the trainer's.
    # One token near a tie of its router may differ (tests/support/agreement.py); weights a rollout older give 2e-3.
    assert job.rows[0]["mismatch/k3"] < 1e-3
    asked = Job(["diagnose", *only_read("diagnose", COMMON), f"init.from='{tmp_path}/ahead'"], tmp_path, "diagnosis")
    assert (done := run_alone(asked)).returncode == 0, done.stderr
    assert "engine and trainer agree" in json.loads((asked.folder / "diagnosis.json").read_text())["verdict"]
    wrong = Job(
        ["diagnose", *only_read("diagnose", COMMON), "rollout.temperature=0.8", f"init.from='{tmp_path}/ahead'"],
        tmp_path,
        "wrong",
    )
    assert (done := run_alone(wrong)).returncode == 0, done.stderr
    verdict = json.loads((wrong.folder / "diagnosis.json").read_text())["verdict"]
    assert verdict.startswith("temperature: that the engine sampled at 1 explains") and verdict in done.stderr
    assert "<svg" in (wrong.folder / "diagnosis.svg").read_text()


@pytest.mark.sglang
@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(240)
def test_two_ranks_share_policy_and_reward_model(base, judge, one_rank, tmp_path):
    steps = ["train.steps=4", "parallel.tensor=2"]
    job = Job(["grpo", *only_read("grpo", COMMON), *steps, *GRPO, *ahead_of(base, judge)], tmp_path, "ahead")
    with launched(job) as launcher:
        assert end_of(job, launcher) == 0, job.log
    assert [row["step"] for row in job.rows] == [1, 2, 3, 4]
    assert (
        all(row["rollout/staleness_max"] <= AHEAD for row in job.rows)
        and max(row["rollout/staleness_max"] for row in job.rows) > 0
    )
    check_scores(job, judge, one_rank)
