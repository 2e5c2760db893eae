"""Reinforcement learning with servers on nodes of their own, as jobs: long forms.

A job that was stopped and went on has the losses of a run that trains without a stop on the same rollouts. These are
the stopped run's own, from its journal: a server that starts again samples others than one that runs on.
"""

from __future__ import annotations

import shutil
import sys

import pytest

from megatron_r1.track.record import read_metrics
from tests.slurm.conftest import RL, STOPS
from tests.support.slurm_cluster import absent

pytestmark = [
    *(pytest.mark.dist, pytest.mark.sglang, pytest.mark.slow, pytest.mark.timeout(1200)),
    pytest.mark.skipif(bool(absent()), reason=absent() or "none"),
]
REWARD = """
def score(prompts, responses, answers, tasks):
    return [sum(map(ord, response)) % 7 / 6 for response in responses]
"""
"""One that differs within every group, so that each step changes the weights."""
JOB = (*RL, "train.steps=4", "train.save_interval=100", "nodes=2", "engine_nodes=1", "submit.generations=6")
MINUTES_OF_A_SERVER = {"time_limit=00:02:00": "time_limit=00:04:00"}
"""Time limits of jobs without servers -> of jobs with servers, whose start takes part of it."""


@pytest.fixture(scope="module")
def arguments(cluster, pretrained) -> tuple[str, ...]:
    """A job's command, without its name."""
    (cluster.folder / "reward.py").write_text(REWARD)
    return ("grpo", *JOB, f"init.from={pretrained}", f"reward={cluster.folder}/reward.py:score")


def learned(cluster, name: str) -> list[dict[str, float]]:
    """What each step of a run learned from its rollout: losses, norms, ratios."""
    rows = read_metrics(cluster.run_folder(name) / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and all(row["train/gradient_norm"] > 0 for row in rows)
    return [{key: value for key, value in row.items() if key.startswith(("policy/", "train/"))} for row in rows]


@pytest.mark.parametrize("how", STOPS)
@pytest.mark.parametrize("mode", ["requeue", "chain", "singleton"])
def test_a_stopped_job_goes_on(cluster, arguments, mode, how):
    name = f"{mode}_{how}"
    limits = [MINUTES_OF_A_SERVER.get(line, line) for line in STOPS[how]]
    job = cluster.submit(*arguments, f"name={name}", f"restart={mode}", *limits)
    cluster.wait_for_step(name)
    stopped = cluster.stop(name, job, how)
    assert stopped == (mode == "requeue" or how != "requeue")
    assert cluster.wait_for_all(900)[cluster.attempts(name)[-1][0]] == "COMPLETED", cluster.logs()
    assert (len(cluster.attempts(name)) > 1) == stopped
    assert replayed(cluster, name, arguments) == learned(cluster, name)


def test_servers_on_the_trainers_node_outlive_its_warning(cluster, arguments):
    """SLURM gives it to them too, since they are processes of the trainer's rank."""
    job = cluster.submit(*arguments, "name=together", "nodes=1", "engine_nodes=0", "restart=none", *STOPS["signal"])
    cluster.wait_for_step("together")
    assert cluster.stop("together", job, "signal")
    assert cluster.wait_for_all(900)[job] == "FAILED" and "exit code 85" in cluster.job_log("together", job)


def replayed(cluster, name: str, arguments: tuple[str, ...]) -> list[dict[str, float]]:
    """What a run without servers and without a stop learns from the rollouts of another run."""
    other = f"{name}_again"
    rollouts = cluster.run_folder(other) / "rollouts"
    shutil.copytree(cluster.run_folder(name) / "rollouts", rollouts)
    before = {path.name: path.read_bytes() for path in rollouts.iterdir()}
    own = [line for line in arguments if line.partition("=")[0].partition(".")[0] not in ("cluster", "submit")]
    own = [line for line in own if line.partition("=")[0] not in ("nodes", "engine_nodes")]
    own += [f"name={other}", "rollout.engine=local"]
    done = cluster.run(sys.executable, "-m", "megatron_r1", *own, deadline=600)
    assert done.returncode == 0, done.stderr
    assert {path.name: path.read_bytes() for path in rollouts.iterdir()} == before, "it sampled"
    return learned(cluster, other)


def test_a_heterogeneous_job_runs_to_its_end(cluster, arguments):
    job = cluster.submit(*arguments, "name=components", "submit.heterogeneous=true", "restart=none")
    states = cluster.wait_for_all()
    assert [states[f"{job}+{component}"] for component in (0, 1)] == ["COMPLETED"] * 2, cluster.logs()
    assert replayed(cluster, "components", arguments) == learned(cluster, "components")
    assert cluster.processes_of(job) == {}


@pytest.mark.parametrize("mode", ["chain", "singleton"])
def test_a_heterogeneous_job_that_is_signalled_goes_on(cluster, arguments, mode):
    name = f"components_{mode}"
    job = cluster.submit(*arguments, f"name={name}", "submit.heterogeneous=true", f"restart={mode}", *STOPS["signal"])
    cluster.wait_for_step(name)
    assert cluster.stop(name, job, "signal")
    states, attempts = cluster.wait_for_all(900), [number for number, _ in cluster.attempts(name)]
    assert len(attempts) == 2 and attempts[0] == job
    assert [states[f"{attempts[1]}+{component}"] for component in (0, 1)] == ["COMPLETED"] * 2, cluster.logs()
    assert replayed(cluster, name, arguments) == learned(cluster, name)
