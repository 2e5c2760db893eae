"""Jobs that `submit` sends to a real cluster of two nodes."""

from __future__ import annotations

import json
import sys

import pytest

from tests.slurm.conftest import STEPS, TINY
from tests.support.slurm_cluster import absent

pytestmark = [pytest.mark.dist, pytest.mark.timeout(400), pytest.mark.skipif(bool(absent()), reason=absent() or "none")]


def losses(folder) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["train/loss"] for row in rows]


def test_a_job_of_two_nodes_trains_to_its_end(cluster):
    arguments = ["pretrain", *TINY, "name=two_nodes", "nodes=2", "time_limit=00:10:00"]
    shown = cluster.run(sys.executable, "-m", "megatron_r1", "submit", *arguments, "dry_run=true")
    assert not (cluster.folder / "runs").exists()
    job = cluster.submit(*arguments)
    assert cluster.wait_for_all()[job] == "COMPLETED", cluster.logs()
    run = cluster.folder / "runs" / "two_nodes"
    assert (run / "jobs" / "train.sh").read_text() in shown.stdout
    assert len(losses(run)) == STEPS and (run / "done.json").exists()
    assert len(list((run / "logs" / "latest").glob("trainer-*.log"))) == 2
    assert "ranks: 2 (cpu)" in cluster.logs()


RL = (
    "cluster.gpus_per_node=0", "cluster.ranks_per_node=1", "cluster.exclusive=false", "cluster.memory_per_node=''",
    "platform=cpu", "track=off", "threads=1", "train.steps=2", "train.schedule.warmup_steps=0", "train.log_interval=1",
    "rl.prompts_per_rollout=2", "rl.group_size=2", "rollout.max_response_tokens=8",
    "rollout.sglang.max_running_requests=8", "rollout.sglang.max_total_tokens=1024",
)  # fmt: skip


@pytest.mark.sglang
def test_one_allocation_trains_on_its_first_node_and_serves_on_its_last(cluster):
    """After the test above, whose model it starts from."""
    base = cluster.run_folder("two_nodes")
    job = cluster.submit("grpo", *RL, "name=zero", f"init.from={base}", "nodes=2", "engine_nodes=1")
    assert cluster.wait_for_all()[job] == "COMPLETED", cluster.logs()
    run = cluster.run_folder("zero")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2] and all(row["rollout/response_length"] > 0 for row in rows)
    names = {path.name.rpartition("-")[0] for path in (run / "logs" / "latest").glob("*.log")}
    assert {name.partition("-")[0] for name in names} == {"trainer", "servers", "server"}
    assert "server-localhost" in names and cluster.processes_of(job) == {}
