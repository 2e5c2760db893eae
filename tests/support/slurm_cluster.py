"""A SLURM cluster of two nodes on this machine: a real controller and two node daemons, in the foreground of this
process, which leave nothing behind.

Its nodes are called `first` and `localhost`, in SLURM's order; the second name leads to this machine, so that what runs
there is found by its node's name.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from megatron_r1.platform.ports import reserve_ports

NODES = ("first", "localhost")
PROGRAMS = ("munged", "slurmctld", "slurmd", "salloc")
START_S = 30.0
MACHINES_THAT_ARE_OFF = (
    "GresTypes=gpu", "SuspendProgram=/bin/true", "ResumeProgram=/bin/true", "SuspendTime=100000",
    "NodeName=gpu[001-160] NodeAddr=127.0.0.1 CPUs=128 RealMemory=100000 Gres=gpu:8 State=CLOUD",
    "PartitionName=gpu Nodes=gpu[001-160]", "PartitionName=short Nodes=gpu[001-002] MaxTime=60",
)  # fmt: skip
"""Nodes of eight GPUs, on which SLURM plans jobs (sbatch --test-only) and none runs."""
CLUSTERS, JOBS, PERIOD = 4, 78, 625
"""Clusters of this machine at one time, and jobs of each, whose own ports differ: job.sh makes them of the job's
number, and numbers that differ by PERIOD have the same ones."""


def absent() -> str:
    """Why there can be no cluster here; empty where there can."""
    if missing := [name for name in PROGRAMS if not shutil.which(name)]:
        return f"needs SLURM (Debian: slurm-wlm, munge): no {missing[0]}"
    return "" if os.geteuid() == 0 else "SLURM's daemons want to be root"


@contextmanager
def slurm_cluster(folder: Path) -> Iterator[dict[str, str]]:
    """The cluster; gives the environment in which SLURM's commands reach it."""
    ports = reserve_ports(3)
    environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
    (folder / "state").mkdir()
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o400)
    files = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
    munge = ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *files]
    commands = [munge, ["slurmctld", "-D", "-c"], *(["slurmd", "-D", "-N", node] for node in NODES)]
    with ExitStack() as stack, (folder / "daemons.log").open("w") as log:
        (folder / "slurm.conf").write_text(configuration(folder, ports, stack.enter_context(first_job())))
        for command in commands:
            daemon = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
            stack.callback(daemon.wait)
            stack.callback(daemon.terminate)
            if command is munge:
                wait_until((folder / "munge.socket").exists, folder)
        show = ["sinfo", "--noheader", "--states=idle", "--format=%D"]

        def idle() -> bool:
            result = subprocess.run(show, env=environment, capture_output=True, text=True)
            return result.stdout.strip() == str(len(NODES))

        wait_until(idle, folder)
        stack.callback(cancel_all_jobs, environment)  # before the daemons stop, which would leave their steps behind
        yield environment


def cancel_all_jobs(environment: dict[str, str]) -> None:
    """End what a test that failed has left in the queue, and wait until its nodes are free of it."""
    left = ["squeue", "--noheader", "--format=%A", "--states=running,completing"]
    subprocess.run(["scancel", "--user=root", "--signal=KILL", "--full"], env=environment, capture_output=True)
    subprocess.run(["scancel", "--user=root"], env=environment, capture_output=True)
    deadline = time.monotonic() + START_S
    while subprocess.run(left, env=environment, capture_output=True).stdout:
        if time.monotonic() > deadline:
            return
        time.sleep(0.1)


@contextmanager
def first_job() -> Iterator[int]:
    """Number of a cluster's first job, so that its next JOBS jobs have ports that no other cluster's jobs have.

    A socket with an abstract name, which ends with its process, keeps the numbers for this cluster.
    """
    with socket.socket(socket.AF_UNIX) as kept:
        for number in range(CLUSTERS):
            with suppress(OSError):
                kept.bind(f"\0megatron_r1-test-cluster-{number}")
                break
        else:
            raise RuntimeError(f"{CLUSTERS} clusters run on this machine already")
        yield 10 * PERIOD + number * JOBS


def configuration(folder: Path, ports: list[int], first_job: int) -> str:
    controller, *nodes = ports
    lines = [
        "ClusterName=test", "SlurmctldHost=localhost", f"SlurmctldPort={controller}", "SlurmUser=root",
        f"FirstJobId={first_job}", "SlurmdUser=root", "AuthType=auth/munge",
        f"AuthInfo=socket={folder}/munge.socket,cred_expire=5",
        f"StateSaveLocation={folder}/state", f"SlurmdSpoolDir={folder}/spool-%n",
        f"SlurmctldPidFile={folder}/slurmctld.pid", f"SlurmdPidFile={folder}/%n.pid",
        "ProctrackType=proctrack/linuxproc", "TaskPlugin=task/none", "SelectType=select/cons_tres",
        "SelectTypeParameters=CR_Core", "SchedulerParameters=bf_interval=1", "MpiDefault=none", "KillWait=2",
        "MinJobAge=3600",  # squeue shows jobs that are over for as long
    ]  # fmt: skip
    lines += [f"NodeName={node} NodeAddr=127.0.0.1 Port={port} CPUs=2" for node, port in zip(NODES, nodes, strict=True)]
    lines += [f"PartitionName=all Nodes={','.join(NODES)} Default=YES"]
    return "\n".join([*lines, *MACHINES_THAT_ARE_OFF, ""])


def wait_until(condition, folder: Path) -> None:
    deadline = time.monotonic() + START_S
    while not condition():
        assert time.monotonic() < deadline, (folder / "daemons.log").read_text()[-2000:]
        time.sleep(0.1)
