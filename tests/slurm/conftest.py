"""One real cluster for the tests of a module.

Most of a job's seconds go to Python's imports and to waiting, so a module's jobs run side by side: its fixtures submit
them, and its tests look at what came of them.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import pytest

from megatron_r1.__main__ import exit_code
from megatron_r1.config.load import load
from megatron_r1.hf.config import hf_config
from megatron_r1.track.record import read_metrics
from tests.support.slurm_cluster import absent, slurm_cluster

ROOT = Path(__file__).resolve().parents[2]
STEPS = 6
SECRET = "planted-3f9a1c7e5b2d"
TINY = (
    "platform=cpu", "track=off", "threads=1", "train.log_interval=1", "train.schedule.warmup_steps=1",
    "data.num_documents=400", "train.global_batch_size=4", "train.micro_batch_size=2", f"train.steps={STEPS}",
    "cluster.gpus_per_node=0", "cluster.ranks_per_node=1", "cluster.exclusive=false", "cluster.memory_per_node=''",
)  # fmt: skip
"""A pre-training job of seconds, on nodes without GPUs."""
RL = (
    "cluster.gpus_per_node=0", "cluster.ranks_per_node=1", "cluster.exclusive=false", "cluster.memory_per_node=''",
    "platform=cpu", "track=off", "threads=1", "train.steps=2", "train.schedule.warmup_steps=0", "train.log_interval=1",
    "rl.prompts_per_rollout=2", "rl.group_size=2", "rollout.max_response_tokens=8",
    "rollout.sglang.max_running_requests=8", "rollout.sglang.max_total_tokens=1024",
    "rollout.sglang.start_timeout_s=600",
)  # fmt: skip
"""Reinforcement learning of two steps, on nodes without GPUs."""
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY"}
"""States of jobs that are over; there are more of others than PENDING and RUNNING, such as SIGNALING."""
STOPS = {
    "signal": ("time_limit=00:30:00",),
    "requeue": ("time_limit=00:30:00",),
    "limit": ("time_limit=00:02:00", "submit.signal_before_s=15"),
    "unwarned": ("time_limit=00:02:00", "submit.signal_before_s=0"),
}
"""How a job is stopped -> what it is submitted with: by `scancel --signal=USR1 --batch`, by `scontrol requeue`, by its
time limit with SLURM's signal before it, and by its time limit without one."""


def losses(folder: Path) -> list[float]:
    """The loss of each step of a run, none of them recorded twice."""
    rows = read_metrics(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["train/loss"] for row in rows]


@dataclass
class Cluster:
    """A running cluster, and a folder in which jobs run."""

    environment: dict[str, str]
    folder: Path

    def run(self, *command: str, folder: Path | None = None, deadline: float = 120) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, env=self.environment, cwd=folder or self.folder, capture_output=True, text=True, timeout=deadline
        )

    @contextmanager
    def entered(self) -> Iterator[None]:
        """This process works in the cluster's folder, with its environment."""
        with pytest.MonkeyPatch.context() as patch:
            for name, value in self.environment.items():
                patch.setenv(name, value)
            patch.chdir(self.folder)
            yield

    def submit(self, *arguments: str, preflight: bool = False) -> str:
        """Submit a verb, as the command line does; returns the first job's id."""
        check = f"submit.preflight={str(preflight).lower()}"
        with self.entered(), redirect_stdout(StringIO()) as printed:
            assert exit_code(["submit", *arguments, check]) == 0, printed.getvalue()
        return printed.getvalue().partition("submitted: job ")[2].split()[0]

    def states(self) -> dict[str, str]:
        """Job -> state, of the jobs that the controller knows."""
        shown = self.run("squeue", "--noheader", "--states=all", "--format=%i %T")
        assert shown.returncode == 0, shown.stderr
        return dict(line.split() for line in shown.stdout.splitlines())

    def wait_for(self, job: str, deadline_s: float = 600) -> str:
        """How a job ended, once it has."""
        self.wait_until(lambda: self.states()[job] in ENDED, deadline_s)
        return self.states()[job]

    def wait_for_all(self, deadline_s: float = 600) -> dict[str, str]:
        """The jobs' states once no job runs or waits any more."""
        deadline = time.monotonic() + deadline_s
        while set(states := self.states().values()) - ENDED:
            assert time.monotonic() < deadline, f"{states}\n{self.logs()}"
            time.sleep(0.5)
        return self.states()

    def wait_until(self, condition: Callable[[], bool], deadline_s: float = 300) -> None:
        """Return once the condition holds."""
        deadline = time.monotonic() + deadline_s
        while not condition():
            assert time.monotonic() < deadline, self.logs()
            time.sleep(0.1)

    def run_folder(self, name: str) -> Path:
        return self.folder / "runs" / name

    def wait_for_step(self, name: str, deadline_s: float = 600) -> None:
        """Return once a run has recorded its first step."""
        metrics = self.run_folder(name) / "metrics.jsonl"
        self.wait_until(lambda: metrics.is_file() and metrics.stat().st_size > 0, deadline_s)

    def attempts(self, name: str) -> list[tuple[str, str]]:
        """Job and newest checkpoint at the start, of each attempt."""
        lines = (self.run_folder(name) / "logs" / "attempts.txt").read_text().splitlines()
        return [(line.split()[0], line.split()[1]) for line in lines]

    def queued(self, name: str) -> list[str]:
        """The jobs that were queued to go on with a run."""
        return (self.run_folder(name) / "logs" / "queued.txt").read_text().split()

    def job_log(self, name: str, job: str) -> str:
        """What a job itself printed, in all its attempts."""
        return (self.run_folder(name) / "logs" / f"job-{job}.log").read_text()

    def processes_of(self, job: str) -> dict[int, str]:
        """Process id -> command line and rank, of the processes that have a job's number in their environment."""
        found, marks = {}, {f"SLURM_JOB_ID={job}", f"SLURM_CONF={self.environment['SLURM_CONF']}"}
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it has ended meanwhile
                variables = set((process / "environ").read_bytes().decode(errors="replace").split("\0"))
                if marks <= variables:
                    rank = next((one for one in variables if one.startswith("SLURM_PROCID=")), "")
                    found[int(process.name)] = (process / "cmdline").read_text().replace("\0", " ") + rank
        return found

    @contextmanager
    def held(self, job: str) -> Iterator[None]:
        """The job's trainer does nothing meanwhile: a job of seconds is not over before it is stopped."""
        lines = self.processes_of(job)
        trainer = [pid for pid, line in lines.items() if re.search(r"^\S*python\S* -m megatron_r1 (?!serve)", line)]
        assert trainer, lines
        _send(trainer, signal.SIGSTOP)
        try:
            yield
        finally:
            _send(trainer, signal.SIGCONT)

    def stop(self, name: str, job: str, how: str) -> bool:
        """Stop a job's first attempt; returns whether SLURM did.

        Args:
            how: a key of STOPS.
        """
        with self.held(job):
            if how == "requeue":
                done = self.run("scontrol", "requeue", job)
                assert not done.returncode or "presently disabled" in done.stderr
                return not done.returncode
            if how == "signal":
                self.run("scancel", "--signal=USR1", "--batch", job)
            reached = "DUE TO TIME LIMIT" if how == "unwarned" else "USR1: the trainer saves"
            self.wait_until(lambda: reached in self.job_log(name, job))
        if how in ("limit", "unwarned"):  # what goes on has time, however slow the machine is
            self._extend((self.queued(name) or [job])[0])
        return True

    def _extend(self, job: str) -> None:
        """Give a job half an hour, once SLURM has queued it again if it was stopped."""
        change = ("scontrol", "update", f"JobId={job}", "TimeLimit=30")
        self.wait_until(lambda: self.run(*change).returncode == 0)

    def logs(self) -> str:
        return "\n".join(path.read_text()[-1500:] for path in sorted(self.folder.rglob("*.log")))


def _send(processes: Iterable[int], number: signal.Signals) -> None:
    for process in processes:
        with suppress(ProcessLookupError):  # SLURM has ended it meanwhile
            os.kill(process, number)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    if reason := absent():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("cluster")
    with slurm_cluster(folder) as environment:
        environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        yield Cluster(environment, folder)


@pytest.fixture(scope="module")
def described(cluster: Cluster) -> str:
    """What `init.from` takes for a model without weights, for jobs that load none."""
    folder = cluster.folder / "described"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(hf_config(load("grpo").model)))
    return f"hf:{folder}"


def pretraining(cluster: Cluster) -> tuple[str, ...]:
    """The command of a job that trains on two nodes; a secret comes from its profile's file."""
    return ("pretrain", *TINY, "name=pretrained", "nodes=2", f"cluster.env_file={cluster.folder}/job.env")


@pytest.fixture(scope="module")
def pretraining_job(cluster: Cluster) -> str:
    """A job that checks its nodes and pre-trains, submitted."""
    (cluster.folder / "job.env").write_text(f"HF_TOKEN={SECRET}\n")
    return cluster.submit(*pretraining(cluster), "time_limit=00:10:00", preflight=True)


@pytest.fixture(scope="module")
def pretrained(cluster: Cluster, pretraining_job: str) -> Path:
    """The run of a job that checked its nodes and trained on two of them to its end."""
    assert cluster.wait_for(pretraining_job) == "COMPLETED", cluster.logs()
    return cluster.run_folder("pretrained")
