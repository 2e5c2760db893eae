"""Ranks as a launcher (torchrun or srun) tells them by environment variables; without torch.

torchrun's variables count only beside a WORLD_SIZE above 1: a shell that a launcher left behind may still have some of
them. One that is missing, or that makes no sense, is an error of one line that names it. srun's count where there is no
WORLD_SIZE, and are translated into torchrun's (`ranks_from_srun`).
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping

import hostlist

from megatron_r1.errors import PlatformError

VARIABLE = re.compile(
    r"TORCHELASTIC_.*|(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)"
    r"|SLURM_(NTASKS|NPROCS|PROCID|LOCALID|STEP_NUM_TASKS)"
)
"""Names of the variables from which the ranks of one job know each other."""
START = "start the ranks with torchrun or srun, which set it, or unset WORLD_SIZE to run one process"
FIRST_PORT, PORTS = 12_000, 20_000
"""Range of MASTER_PORT of a step of a SLURM job: below those that the system gives to connections."""


def without_launcher(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment for processes that are no ranks of this job."""
    return {name: value for name, value in environment.items() if not VARIABLE.fullmatch(name)}


def ranks_from_srun(environment: Mapping[str, str]) -> dict[str, str]:
    """torchrun's variables for a task of a step that srun started; none without srun, or where WORLD_SIZE is set.

    Raises:
        PlatformError: one of srun's variables is missing or makes no sense.
    """
    if "WORLD_SIZE" in environment or "SLURM_STEP_NUM_TASKS" not in environment:
        return {}

    def read(name: str) -> str:
        if name in environment:
            return environment[name]
        raise PlatformError(f"{name} is not set, and SLURM_STEP_NUM_TASKS is: start the ranks with srun")

    try:
        ranks, node = int(read("SLURM_STEP_NUM_TASKS")), int(read("SLURM_NODEID"))
        if ranks == 1:
            return {}
        step = int(read("SLURM_JOB_ID")) * 16 + int(read("SLURM_STEP_ID"))
        tasks = tasks_of_nodes(read("SLURM_STEP_TASKS_PER_NODE"))
        nodes = hostlist.expand_hostlist(read("SLURM_STEP_NODELIST"))
        found = {
            "WORLD_SIZE": str(ranks),
            "RANK": read("SLURM_PROCID"),
            "LOCAL_WORLD_SIZE": str(tasks[node]),
            "LOCAL_RANK": read("SLURM_LOCALID"),
            "MASTER_ADDR": nodes[0] if len(nodes) > 1 else "127.0.0.1",
            "MASTER_PORT": str(FIRST_PORT + step % PORTS),
        }
    except (ValueError, IndexError, hostlist.BadHostlist) as error:
        raise PlatformError(f"SLURM's variables of this step make no sense: {error}") from None
    return found | {name: environment[name] for name in ("MASTER_ADDR", "MASTER_PORT") if environment.get(name)}


def tasks_of_nodes(written: str) -> list[int]:
    """Tasks of each node from SLURM's short form, such as ``8(x3),4``.

    Raises:
        ValueError: it is no such form.
    """
    if not re.fullmatch(r"\d+(\(x\d+\))?(,\d+(\(x\d+\))?)*", written):
        raise ValueError(f"{written} is no list of tasks")
    runs = re.findall(r"(\d+)(?:\(x(\d+)\))?", written)
    return [int(tasks) for tasks, nodes in runs for _ in range(int(nodes or 1))]


def world_size() -> int:
    """Ranks that the launcher started; 1 without a launcher."""
    return _number("WORLD_SIZE", 1, least=1)


def rank() -> int:
    """This process's rank; 0 without a launcher."""
    ranks = world_size()
    return _number("RANK", least=0, below=ranks) if ranks > 1 else 0


def local_world_size() -> int:
    """Ranks on this machine; all ranks where the launcher does not set the number."""
    ranks = world_size()
    return _number("LOCAL_WORLD_SIZE", ranks, least=1, below=ranks + 1) if ranks > 1 else 1


def local_rank() -> int:
    """This process's rank among those of this machine, which numbers its GPU; 0 without a launcher."""
    ranks = local_world_size()
    return _number("LOCAL_RANK", rank() if ranks == world_size() else None, least=0, below=ranks) if ranks > 1 else 0


def is_rank_zero() -> bool:
    """Whether this is rank 0: the one that prints, writes the run folder and drives the rollout engine."""
    return rank() == 0


def check_launcher() -> None:
    """Refuse variables by which the ranks could not find each other.

    Raises:
        PlatformError: names the first variable that is missing or wrong.
    """
    if world_size() == 1:
        if "WORLD_SIZE" not in os.environ and (tasks := os.environ.get("SLURM_NTASKS", "1")) != "1":
            raise PlatformError(
                f"SLURM_NTASKS={tasks}: srun has to start these tasks (srun python -m megatron_r1 ...); "
                "WORLD_SIZE=1 runs one process"
            )
        return
    rank(), local_rank()
    address = os.environ.get("MASTER_ADDR", "")
    if not address:
        raise PlatformError(f"MASTER_ADDR is not set, and WORLD_SIZE={world_size()}: {START}")
    _number("MASTER_PORT", least=1, below=2**16)
    try:
        socket.getaddrinfo(address, None)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise PlatformError(f"MASTER_ADDR={address}: this machine does not know the host ({reason})") from error


def _number(name: str, default: int | None = None, *, least: int, below: int | None = None) -> int:
    text = os.environ.get(name)
    if text is None:
        if default is None:
            raise PlatformError(f"{name} is not set, and WORLD_SIZE={world_size()}: {START}")
        return default
    limits = f"from {least}" if below is None else f"from {least} to {below - 1}"
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least or (below is not None and value >= below):
        raise PlatformError(f"{name}={text}: must be a whole number {limits}; {START}")
    return value
