"""The preflight on a real cluster of two nodes: a job that passes, and three that end before a model."""

from __future__ import annotations

import re
import socket
from contextlib import contextmanager

import pytest

from tests.slurm.conftest import RL, STEPS, TINY, Cluster, losses
from tests.support.slurm_cluster import NODES, absent

pytestmark = [pytest.mark.dist, pytest.mark.timeout(400), pytest.mark.skipif(bool(absent()), reason=absent() or "none")]
SECRET = "planted-3f9a1c7e5b2d"


def log_of(cluster: Cluster, name: str, job: str) -> str:
    return (cluster.run_folder(name) / "logs" / f"job-{job}.log").read_text()


def submit(cluster: Cluster, name: str, *arguments: str) -> str:
    return cluster.submit(*arguments, f"name={name}", "nodes=2", "time_limit=00:10:00", preflight=True)


def failures(log: str, node: str) -> list[str]:
    return re.findall(rf"^preflight: FAILED on {node}: (.*)", log, re.MULTILINE)


@contextmanager
def closed_port():
    """A port of this machine on which nothing listens, and nothing can meanwhile."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


@pytest.fixture(scope="module")
def passed(cluster: Cluster) -> tuple[str, str]:
    """Job and log of a job whose nodes are as they must be; a secret comes from its profile's file."""
    (cluster.folder / "job.env").write_text(f"HF_TOKEN={SECRET}\n")
    job = submit(cluster, "sound", "pretrain", *TINY, f"cluster.env_file={cluster.folder}/job.env")
    assert cluster.wait_for_all()[job] == "COMPLETED", cluster.logs()
    return job, log_of(cluster, "sound", job)


def test_a_job_on_sound_nodes_passes_and_trains(cluster, passed):
    _, log = passed
    assert len(losses(cluster.run_folder("sound"))) == STEPS
    (speed,) = re.findall(r"^all-reduce +1/1 +ok +2 ranks by gloo, 4 MiB: ([\d.e+-]+) GB/s", log, re.MULTILINE)
    assert float(speed) > 0
    assert re.search(r"^run folder +2/2 +ok ", log, re.MULTILINE) and re.search(r"^disk +2/2 +ok ", log, re.MULTILINE)
    assert "FAILED" not in log and not (cluster.run_folder("sound") / ".preflight").exists()


def test_what_a_job_writes_holds_no_secret_of_its_file(cluster, passed):
    (cluster.folder / "job.env").unlink(missing_ok=True)
    files = [path for path in cluster.run_folder("sound").rglob("*") if path.is_file()]
    assert len(files) > 5 and [path for path in files if SECRET.encode() in path.read_bytes()] == []


def test_bad_nodes_end_the_job_by_name_before_a_model_is_built(cluster):
    """Three jobs, each with one fault."""
    blocked = cluster.run_folder("blocked")
    blocked.mkdir(parents=True)
    (blocked / ".preflight").touch()  # root may write everywhere, but a file is no folder
    none = ("restart=none",)
    with closed_port() as port:
        judge = ("reward.judge=1.0", f"reward.judge_config.url=http://127.0.0.1:{port}/v1", "engine_nodes=1")
        base = cluster.folder / "runs" / "sound"
        jobs = {
            "blocked": submit(cluster, "blocked", "pretrain", *TINY, *none),
            "no_gpus": submit(cluster, "no_gpus", "pretrain", *TINY, *none,
                              "+cluster.environment.MEGATRON_R1_GPUS_PER_NODE='99'"),
            "no_judge": submit(cluster, "no_judge", "grpo", *RL, *none, *judge, f"init.from={base}"),
        }  # fmt: skip
        states = cluster.wait_for_all()
    logs = {name: log_of(cluster, name, job) for name, job in jobs.items()}
    expected = {
        "blocked": r"run folder: .*\.preflight.*: put the run",
        "no_gpus": r"GPUs: \d+ of 99.*: leave the node out",
        "no_judge": r"judge: http://127.0.0.1:\d+/v1 does not answer \(.*refused.*\): start it",
    }
    for name, pattern in expected.items():
        assert states[jobs[name]] == "FAILED", logs[name]
        named = [node for node in NODES if any(re.match(pattern, line) for line in failures(logs[name], node))]
        assert named == list(NODES) if name != "blocked" else named, logs[name]
        assert "exit code 90" in logs[name], logs[name]
        folder = cluster.run_folder(name)
        assert not (folder / "metrics.jsonl").exists() and not list(folder.glob("logs/*/trainer-*.log"))
