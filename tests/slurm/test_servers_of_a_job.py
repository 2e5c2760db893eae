"""What tasks of a real SLURM job know of one another: their ranks, and where servers are."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from megatron_r1.cluster.job import job_script
from megatron_r1.cluster.request import requested_job
from megatron_r1.config.load import load
from megatron_r1.config.verbs import JobCommand
from megatron_r1.hf.config import hf_config
from tests.slurm.conftest import RL
from tests.support.slurm_cluster import NODES, absent

pytestmark = pytest.mark.skipif(bool(absent()), reason=absent() or "none")


SHOW = """
import json, os, sys
from megatron_r1.platform.launcher import ranks_from_srun
found = ranks_from_srun(os.environ)
with open(f"{sys.argv[1]}/{found['RANK']}.json", "w") as file:
    json.dump({**found, "node": os.environ["SLURMD_NODENAME"]}, file)
"""


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


SERVERS = "rollout.sglang.servers=2"
STAND_IN = """#!/bin/bash
program={program}
[[ "$*" == *preflight* ]] && program=
exec {python} $program "$@"
"""
"""Python for a job: a role is the test's own program, the preflight is the real one."""


@pytest.mark.dist
@pytest.mark.timeout(240)
@pytest.mark.parametrize("heterogeneous", [False, True])
def test_the_trainer_of_a_job_finds_the_servers_of_its_other_nodes(cluster, heterogeneous):
    """The scripts of both kinds of job, with a stand-in for Python: real servers are in test_submitted_jobs.py.

    The preflight of the heterogeneous one runs; test_preflight.py has that of one allocation.
    """
    name = "components" if heterogeneous else "allocation"
    program = cluster.folder / "python"
    program.write_text(STAND_IN.format(program=Path(__file__).parent / "role_of_a_job.py", python=sys.executable))
    program.chmod(0o755)
    one, both = ("submit.heterogeneous=false", "submit.preflight=false"), ("submit.heterogeneous=true",)
    kind = ("nodes=2", "engine_nodes=1", "restart=none", *(both if heterogeneous else one))
    model = cluster.folder / "model"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text(json.dumps(hf_config(load("grpo").model)))
    lines = (*RL, *kind, f"name={name}", f"init.from=hf:{model}", f"cluster.python={program}", SERVERS)
    script = cluster.folder / f"{name}.sh"
    (cluster.run_folder(name) / "logs").mkdir(parents=True)
    script.write_text(job_script(requested_job(JobCommand("grpo", "r1_zero", lines), lambda _: None)))
    job = cluster.run("sbatch", "--parsable", str(script)).stdout.strip()
    states = cluster.wait_for_all()
    assert {state for number, state in states.items() if number.partition("+")[0] == job} == {"COMPLETED"}, (
        cluster.logs()
    )
    found = json.loads((cluster.folder / f"{name}.json").read_text())
    ports = [12000 + (int(job) * 64 + number) % 20000 for number in (1, 2)]
    assert found == {
        "urls": [f"http://{NODES[1]}:{port}" for port in ports], "node": NODES[0], "keys_agree": True, "keys": 2,
        "ignores_warning": True,
    }  # fmt: skip
    if heterogeneous:
        log = cluster.job_log(name, job)
        assert re.search(r"^all-reduce +1/1 +ok +2 ranks by gloo", log, re.MULTILINE), log
        assert re.search(r"^run folder +2/2 +ok ", log, re.MULTILINE), log
        assert not (cluster.run_folder(name) / ".preflight").exists()
