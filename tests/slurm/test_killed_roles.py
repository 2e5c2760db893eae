"""A role that is killed ends its job, with that role's exit code and message, and leaves no process."""

from __future__ import annotations

import os
import signal
import sys
import time

import pytest

from tests.slurm.conftest import RL, TINY, Cluster
from tests.support.slurm_cluster import absent

pytestmark = [
    *(pytest.mark.dist, pytest.mark.slow, pytest.mark.timeout(900)),
    pytest.mark.skipif(bool(absent()), reason=absent() or "none"),
]
BOUND_S = 30.0


def kill_and_wait(cluster: Cluster, job: str, name: str, *words: str) -> tuple[str, str]:
    """Kill the job's process with these words in its command line; returns the job's end state and its log."""
    programs = {pid: line for pid, line in cluster.processes_of(job).items() if line.startswith(sys.executable)}
    os.kill(next(pid for pid, line in programs.items() if all(word in line for word in words)), signal.SIGKILL)
    killed = time.monotonic()
    state = cluster.wait_for_all()[job]
    assert time.monotonic() - killed < BOUND_S
    assert cluster.processes_of(job) == {}
    return state, (cluster.run_folder(name) / "logs" / f"job-{job}.log").read_text()


def test_a_killed_rank_ends_the_job_with_its_code(cluster):
    job = cluster.submit(
        "pretrain", *TINY, "name=killed", "nodes=2", "restart=none", "train.steps=500", "time_limit=00:10:00"
    )
    cluster.wait_for_step("killed")
    state, log = kill_and_wait(cluster, job, "killed", "-m megatron_r1", "SLURM_PROCID=1")
    assert state == "FAILED" and "rank 1 on localhost ended first, with exit code 137" in log


def test_a_killed_server_ends_the_job_after_the_trainer_has_saved(cluster, pretrained):
    job = cluster.submit(
        "grpo", *RL, "name=served", f"init.from={pretrained}", "nodes=2", "engine_nodes=1", "restart=none",
        "train.steps=500", "submit.grace_s=10",
    )  # fmt: skip
    cluster.wait_for_step("served")
    state, log = kill_and_wait(cluster, job, "served", "servers.launch")
    assert state == "FAILED" and "servers: rank 0 on localhost ended first, with exit code 87" in log
    assert "SGLang server ended with status -9" in log
    assert list((cluster.run_folder("served") / "checkpoints").glob("step-*"))
