"""A real heterogeneous SLURM job: one component's trainer finds and asks the SGLang server that the other starts."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_r1.config.model import ModelConfig
from megatron_r1.model.build import native_tensors
from megatron_r1.rollout.sglang.servers.discovery import ADMIN_KEY, API_KEY
from megatron_r1.rollout.sync.strategies import DiskSync
from tests.support.slurm_cluster import NODES, absent, free_ports

pytestmark = [pytest.mark.sglang, pytest.mark.skipif(bool(absent()), reason=absent() or "none")]


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


def test_a_trainer_finds_the_server_that_another_component_of_its_job_starts(cluster, new_model, tmp_path):
    from megatron_r1.config.data import DataConfig
    from megatron_r1.data.synthetic.train_tokenizer import train_tokenizer

    shape = ModelConfig(init_std=0.08)
    train_tokenizer(DataConfig(num_documents=2000)).save(tmp_path / "tokenizer")
    (port,) = free_ports(1)
    with DiskSync(lambda: native_tensors(new_model(shape)), shape, tmp_path / "tokenizer") as disk:
        (tmp_path / "model").symlink_to(disk.write())
        steps = f"{sys.executable} {Path(__file__).parent / 'steps_of_a_job.py'}"
        job = (
            f"srun --het-group=1 {steps} serve {tmp_path} {port} & "
            f"srun --het-group=0 {steps} ask {tmp_path} {port}; asked=$?; "
            "[ $asked = 0 ] && wait; exit $asked"
        )
        trainer, servers = ([f"--nodelist={node}", "--ntasks=1"] for node in NODES)
        environment = cluster.environment | {API_KEY: "user", ADMIN_KEY: "admin"}
        command = ["salloc", *trainer, ":", *servers, "bash", "-c", job]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "answers.json").read_text())
    assert result["urls"] == [f"http://{NODES[1]}:{port}"] and result["started"] == 0
    assert result["versions"] == ["initial"], "the server was not given the trainer's weights"
    assert [len(tokens) for tokens in result["tokens"]] == [4]
