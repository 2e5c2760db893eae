"""Jobs that `submit` sends to a real cluster of two nodes."""

from __future__ import annotations

import sys

import pytest

from megatron_r1.track.record import read_metrics
from tests.slurm.conftest import RL, STEPS, TINY, losses
from tests.support.slurm_cluster import absent

pytestmark = [pytest.mark.dist, pytest.mark.timeout(400), pytest.mark.skipif(bool(absent()), reason=absent() or "none")]


def test_a_job_of_two_nodes_trains_to_its_end(cluster, pretrained):
    assert len(losses(pretrained)) == STEPS and (pretrained / "done.json").exists()
    assert len(list((pretrained / "logs" / "latest").glob("trainer-*.log"))) == 2
    assert "ranks: 2 (cpu)" in cluster.logs()


def test_a_dry_run_shows_the_script_of_a_job_and_writes_nothing(cluster, pretrained):
    arguments = ["pretrain", *TINY, "name=pretrained", "nodes=2"]
    elsewhere = cluster.folder / "dry"
    elsewhere.mkdir()
    options = ("submit.preflight=false", "dry_run=true")
    shown = cluster.run(sys.executable, "-m", "megatron_r1", "submit", *arguments, *options, folder=elsewhere)
    assert shown.returncode == 0 and (pretrained / "jobs" / "train.sh").read_text() in shown.stdout
    assert not list(elsewhere.iterdir())


@pytest.mark.sglang
def test_one_allocation_trains_on_its_first_node_and_serves_on_its_last(cluster, pretrained):
    job = cluster.submit("grpo", *RL, "name=zero", f"init.from={pretrained}", "nodes=2", "engine_nodes=1")
    assert cluster.wait_for_all()[job] == "COMPLETED", cluster.logs()
    run = cluster.run_folder("zero")
    rows = read_metrics(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2] and all(row["rollout/response_length"] > 0 for row in rows)
    names = {path.name.rpartition("-")[0] for path in (run / "logs" / "latest").glob("*.log")}
    assert {name.partition("-")[0] for name in names} == {"trainer", "servers", "server"}
    assert "server-localhost" in names and cluster.processes_of(job) == {}
