"""What tasks of a real SLURM job know of one another: their ranks, and where servers are."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from megatron_r1.cluster.job import job_script
from megatron_r1.cluster.request import requested_job
from megatron_r1.config.verbs import JobCommand
from tests.slurm.conftest import RL, Cluster
from tests.support.slurm_cluster import NODES, absent

pytestmark = pytest.mark.skipif(bool(absent()), reason=absent() or "none")
SHOW = """
import json, os, sys
from megatron_r1.platform.launcher import ranks_from_srun
found = ranks_from_srun(os.environ)
with open(f"{sys.argv[1]}/{found['RANK']}.json", "w") as file:
    json.dump({**found, "node": os.environ["SLURMD_NODENAME"]}, file)
"""
STAND_IN = """#!/bin/bash
program={program}
[[ "$*" == *preflight* ]] && program=
exec {python} $program "$@"
"""
"""Python for a job: a role is the test's own program, the preflight is the real one."""
KINDS = {
    "allocation": ("submit.heterogeneous=false", "submit.preflight=false"),
    "components": ("submit.heterogeneous=true",),
}
"""Kind of job -> its settings. The preflight of the heterogeneous one runs; test_submitted_jobs.py has the other's."""


@pytest.fixture(scope="module", autouse=True)
def jobs(cluster: Cluster, described: str) -> dict[str, str]:
    """Kind -> job, of the scripts of both kinds, with a stand-in for Python."""
    program = cluster.folder / "python"
    program.write_text(STAND_IN.format(program=Path(__file__).parent / "role_of_a_job.py", python=sys.executable))
    program.chmod(0o755)
    roles = ("nodes=2", "engine_nodes=1", "restart=none", f"cluster.python={program}", "rollout.sglang.servers=2")
    submitted = {}
    for kind, settings in KINDS.items():
        lines = (*RL, *roles, *settings, f"name={kind}", f"init.from={described}")
        (cluster.run_folder(kind) / "logs").mkdir(parents=True)
        script = cluster.folder / f"{kind}.sh"
        script.write_text(job_script(requested_job(JobCommand("grpo", "r1_zero", lines), lambda _: None)))
        submitted[kind] = cluster.run("sbatch", "--parsable", str(script)).stdout.strip()
    return submitted


def test_tasks_that_srun_starts_know_their_ranks(cluster, tmp_path):
    (tmp_path / "show.py").write_text(SHOW)
    command = ["salloc", "--nodes=2", "--ntasks=3", "srun", sys.executable, str(tmp_path / "show.py"), str(tmp_path)]
    done = cluster.run(*command)
    assert done.returncode == 0, done.stderr[-3000:]
    tasks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    nodes = [task["node"] for task in tasks]
    for rank, task in enumerate(tasks):
        assert (task["WORLD_SIZE"], task["RANK"]) == ("3", str(rank))
        assert task["LOCAL_WORLD_SIZE"] == str(nodes.count(task["node"]))
        assert task["LOCAL_RANK"] == str(nodes[:rank].count(task["node"]))
        assert task["MASTER_ADDR"] == nodes[0] and task["MASTER_PORT"] == tasks[0]["MASTER_PORT"]


@pytest.mark.dist
@pytest.mark.timeout(240)
@pytest.mark.parametrize("kind", KINDS)
def test_the_trainer_of_a_job_finds_the_servers_of_its_other_nodes(cluster, jobs, kind):
    """Real servers are in test_submitted_jobs.py."""
    states = cluster.wait_for_all()
    assert {state for number, state in states.items() if number.partition("+")[0] == jobs[kind]} == {"COMPLETED"}, (
        cluster.logs()
    )
    found = json.loads((cluster.folder / f"{kind}.json").read_text())
    ports = [12000 + (int(jobs[kind]) * 64 + number) % 20000 for number in (1, 2)]
    assert found == {
        "urls": [f"http://{NODES[1]}:{port}" for port in ports], "node": NODES[0], "keys_agree": True, "keys": 2,
        "ignores_warning": True,
    }  # fmt: skip


def test_both_components_of_a_job_are_checked_together(cluster, jobs):
    assert cluster.wait_for_all()
    log = cluster.job_log("components", jobs["components"])
    assert re.search(r"^all-reduce +1/1 +ok +2 ranks by gloo", log, re.MULTILINE), log
    assert re.search(r"^run folder +2/2 +ok ", log, re.MULTILINE), log
    assert not (cluster.run_folder("components") / ".preflight").exists()
