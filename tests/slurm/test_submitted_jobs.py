"""Jobs that `submit` sends to a real cluster of two nodes: those that pass the preflight run to their end, the others
end before a model is built.
"""

from __future__ import annotations

import re
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from megatron_r1.track.record import read_metrics
from tests.slurm.conftest import RL, SECRET, STEPS, TINY, Cluster, losses, pretraining
from tests.support.slurm_cluster import NODES, absent

pytestmark = [pytest.mark.dist, pytest.mark.timeout(400), pytest.mark.skipif(bool(absent()), reason=absent() or "none")]
REFUSALS = {
    "blocked": r"run folder: .*\.preflight.*: put the run",
    "no_gpus": r"GPUs: \d+ of 99.*: leave the node out",
    "no_judge": r"judge: http://127.0.0.1:\d+/v1 does not answer \(.*refused.*\): start it",
}
"""Job -> what its preflight says of a node."""


@contextmanager
def closed_port() -> Iterator[int]:
    """A port of this machine on which nothing listens, and nothing can meanwhile."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


@pytest.fixture(scope="module", autouse=True)
def refused(cluster: Cluster, pretraining_job: str, described: str) -> Iterator[dict[str, str]]:
    """Name -> job, of three jobs with one fault each."""
    blocked = cluster.run_folder("blocked")
    blocked.mkdir(parents=True)
    (blocked / ".preflight").touch()  # root may write everywhere, but a file is no folder
    gpus = "+cluster.environment.MEGATRON_R1_GPUS_PER_NODE='99'"
    with closed_port() as port:
        judge = ("reward.judge=1.0", f"reward.judge_config.url=http://127.0.0.1:{port}/v1", f"init.from={described}")
        commands = {
            "blocked": ("pretrain", *TINY),
            "no_gpus": ("pretrain", *TINY, gpus),
            "no_judge": ("grpo", *RL, *judge, "engine_nodes=1", "check.warn_only=[18,19,20]"),
        }
        common = ("nodes=2", "restart=none", "time_limit=00:10:00")
        yield {
            name: cluster.submit(*command, f"name={name}", *common, preflight=True)
            for name, command in commands.items()
        }


@pytest.fixture(scope="module")
def served(cluster: Cluster, pretrained) -> str:
    """A job that trains by samples of a server on its other node."""
    return cluster.submit("grpo", *RL, "name=zero", f"init.from={pretrained}", "nodes=2", "engine_nodes=1")


@pytest.mark.sglang
@pytest.mark.usefixtures("served")  # which runs while the tests before its own look at the others
def test_a_job_of_two_nodes_trains_to_its_end(cluster, pretrained):
    assert len(losses(pretrained)) == STEPS and (pretrained / "done.json").exists()
    assert len(list((pretrained / "logs" / "latest").glob("trainer-*.log"))) == 2
    assert "ranks: 2 (cpu)" in cluster.logs()


def test_a_dry_run_shows_the_script_of_a_job_and_writes_nothing(cluster, pretrained):
    elsewhere = cluster.folder / "dry"
    elsewhere.mkdir()
    command = ("submit", *pretraining(cluster), "time_limit=00:10:00", "dry_run=true")
    shown = cluster.run(sys.executable, "-m", "megatron_r1", *command, folder=elsewhere)
    assert shown.returncode == 0 and (pretrained / "jobs" / "train.sh").read_text() in shown.stdout
    assert not list(elsewhere.iterdir())


def test_sound_nodes_pass_the_preflight(cluster, pretraining_job, pretrained):
    log = cluster.job_log("pretrained", pretraining_job)
    (speed,) = re.findall(r"^all-reduce +1/1 +ok +2 ranks by gloo, 4 MiB: ([\d.e+-]+) GB/s", log, re.MULTILINE)
    assert float(speed) > 0
    assert re.search(r"^run folder +2/2 +ok ", log, re.MULTILINE) and re.search(r"^disk +2/2 +ok ", log, re.MULTILINE)
    assert "FAILED" not in log and not (pretrained / ".preflight").exists()


def test_what_a_job_writes_holds_no_secret_of_its_file(cluster, pretrained):
    (cluster.folder / "job.env").unlink(missing_ok=True)
    files = [path for path in pretrained.rglob("*") if path.is_file()]
    assert len(files) > 5 and [path for path in files if SECRET.encode() in path.read_bytes()] == []


@pytest.mark.parametrize("name", REFUSALS)
def test_bad_nodes_end_a_job_by_name_before_a_model_is_built(cluster, refused, name):
    state, log = cluster.wait_for(refused[name]), cluster.job_log(name, refused[name])
    assert state == "FAILED" and "exit code 90" in log, log
    said = {node: re.findall(rf"^preflight: FAILED on {node}: (.*)", log, re.MULTILINE) for node in NODES}
    named = [node for node, lines in said.items() if any(re.match(REFUSALS[name], line) for line in lines)]
    assert named == list(NODES) if name != "blocked" else named, log
    folder = cluster.run_folder(name)
    assert not (folder / "metrics.jsonl").exists() and not list(folder.glob("logs/*/trainer-*.log"))


@pytest.mark.sglang
def test_one_allocation_trains_on_its_first_node_and_serves_on_its_last(cluster, served):
    assert cluster.wait_for(served) == "COMPLETED", cluster.logs()
    run = cluster.run_folder("zero")
    rows = read_metrics(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2] and all(row["rollout/response_length"] > 0 for row in rows)
    names = {path.name.rpartition("-")[0] for path in (run / "logs" / "latest").glob("*.log")}
    assert {name.partition("-")[0] for name in names} == {"trainer", "servers", "server"}
    assert "server-localhost" in names and cluster.processes_of(served) == {}
