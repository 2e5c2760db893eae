"""Finds the servers that another step or component of this program's SLURM job starts on the job's nodes.

SLURM gives every task the job's nodes in `SLURM_JOB_NODELIST`, and those of a heterogeneous job's components in
`SLURM_JOB_NODELIST_HET_GROUP_<number>`, as host lists (``node[01-03,7]``). The package python-hostlist expands them:
``scontrol show hostnames`` need not exist inside a container.
"""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Mapping, Sequence
from urllib.parse import urlsplit

import hostlist

from megatron_r1.config.sglang import SlurmConfig
from megatron_r1.errors import ConfigError, NoRolloutCapacity

NODES = "SLURM_JOB_NODELIST"
COMPONENT = f"{NODES}_HET_GROUP_"
POLL_S, CONNECT_S = 0.5, 5.0

HOST = re.compile(r"[\w.-]+")
_KEY = "rollout.sglang.slurm"


def addresses(config: SlurmConfig, environment: Mapping[str, str]) -> list[str]:
    """``http://host:port`` of every server, node by node.

    Args:
        config: which nodes and ports.
        environment: this task's variables.

    Raises:
        ConfigError: this is no such job, or it has no such nodes.
    """
    nodes = expand(_host_list(config, environment))
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


def expand(host_list: str) -> list[str]:
    """The names of a host list, in SLURM's order where a name has at most two brackets (SLURM itself writes one).

    Raises:
        ConfigError: it is no host list.
    """
    try:
        names: list[str] = hostlist.expand_hostlist(host_list, allow_duplicates=True)
    except hostlist.BadHostlist as error:
        raise ConfigError(NODES, host_list, f"is no host list: {error}") from None
    for name in names:
        if not HOST.fullmatch(name):
            raise ConfigError(NODES, host_list, f"is no host list: {name!r} is no name of a host")
    return names


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
