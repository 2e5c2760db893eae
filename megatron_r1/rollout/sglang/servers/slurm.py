"""Where servers are, when another step or component of this program's SLURM job starts them: on its nodes.

SLURM tells every task the job's nodes in `SLURM_JOB_NODELIST`, and those of a heterogeneous job's components in
`SLURM_JOB_NODELIST_HET_GROUP_<number>`, as host lists (``node[01-03,7]``). They are expanded here as
``scontrol show hostnames`` does it, which need not be there inside a container.
"""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Mapping, Sequence
from urllib.parse import urlsplit

from megatron_r1.config.sglang import SlurmConfig
from megatron_r1.errors import ConfigError, NoRolloutCapacity

NODES = "SLURM_JOB_NODELIST"
COMPONENT = f"{NODES}_HET_GROUP_"
POLL_S, CONNECT_S = 0.5, 5.0

_RANGE = r"\d+(?:-\d+)?"
_BRACKET = rf"\[{_RANGE}(?:,{_RANGE})*\]"
_HOSTS = re.compile(rf"[\w.-]+|(?:[\w.-]*{_BRACKET})+")
"""One part of a host list: a name, or one with brackets, behind the last of which nothing comes."""
_PIECE = re.compile(rf"([\w.-]*)({_BRACKET})")
_KEY = "rollout.sglang.slurm"


def addresses(config: SlurmConfig, environment: Mapping[str, str]) -> list[str]:
    """``http://host:port`` of every server, node by node.

    Args:
        config: which nodes and ports.
        environment: this task's variables.

    Raises:
        ConfigError: this is no such job, or it has no such nodes.
    """
    nodes = expanded(_host_list(config, environment))
    if config.skip_nodes >= len(nodes):
        raise ConfigError(
            f"{_KEY}.skip_nodes", config.skip_nodes, f"must be below the {len(nodes)} nodes that there are"
        )
    return [f"http://{node}:{port}" for node in nodes[config.skip_nodes :] for port in config.ports]


def wait_for(urls: Sequence[str], timeout_s: float) -> None:
    """Return when something listens at every address.

    Raises:
        NoRolloutCapacity: it does not within `timeout_s` seconds.
    """
    deadline = time.monotonic() + timeout_s
    for url in urls:
        while (reason := _silence(url)) is not None:
            if time.monotonic() > deadline:
                raise NoRolloutCapacity(f"{url}: no server answers after {timeout_s:g} s: {reason}")
            time.sleep(POLL_S)


def expanded(host_list: str) -> list[str]:
    """The names that a host list stands for, in SLURM's order.

    Raises:
        ConfigError: it is no host list.
    """
    names: list[str] = []
    for part in re.split(r",(?![^\[]*\])", host_list):
        if not _HOSTS.fullmatch(part):
            raise ConfigError(NODES, host_list, f"is no host list: {part!r}")
        names += _names(part)
    return names


def _names(part: str) -> list[str]:
    """Of brackets all but the last count like digits from the left, each time through the last one's numbers."""
    pieces = [(prefix, _numbers(bracket)) for prefix, bracket in _PIECE.findall(part)]
    if not pieces:
        return [part]
    *outer, (prefix, numbers) = pieces
    starts = [""]
    for before, among in outer:
        starts = [f"{start}{before}{number}" for number in among for start in starts]
    return [f"{start}{prefix}{number}" for start in starts for number in numbers]


def _numbers(bracket: str) -> list[str]:
    """The numbers of ``[01-03,7]``, as wide as the first of each range is written."""
    numbers: list[str] = []
    for part in bracket[1:-1].split(","):
        first, _, last = part.partition("-")
        if int(last or first) < int(first):
            raise ConfigError(NODES, bracket, f"is no host list: {part} runs backwards")
        numbers += [f"{number:0{len(first)}d}" for number in range(int(first), int(last or first) + 1)]
    return numbers


def _host_list(config: SlurmConfig, environment: Mapping[str, str]) -> str:
    if not (whole := environment.get(NODES)):
        raise ConfigError(f"{_KEY}.nodes", config.nodes, f"needs a SLURM job: {NODES} is not set")
    components = {
        int(number): nodes
        for name, nodes in environment.items()
        if name.startswith(COMPONENT) and (number := name.removeprefix(COMPONENT)).isdecimal()
    }
    there = f"0 to {max(components)}" if components else "none: it is not heterogeneous"
    if config.nodes == "job":
        if components:
            raise ConfigError(f"{_KEY}.nodes", "job", f"must be component: this job has components {there}")
        return whole
    if config.component not in components:
        raise ConfigError(f"{_KEY}.component", config.component, f"must be one of this job's components, {there}")
    return components[config.component]


def _silence(url: str) -> str | None:
    """Why nothing can be reached at an address; None when something can."""
    split = urlsplit(url)
    try:
        socket.create_connection((split.hostname, split.port), timeout=CONNECT_S).close()
    except OSError as error:
        return error.strerror or str(error)
    return None
