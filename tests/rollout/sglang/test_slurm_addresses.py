"""Servers by the nodes of a SLURM job: its variables, and host lists as SLURM itself reads them."""

import os
import random
import re
import shutil
import socket
import subprocess
import threading
import time

import pytest

from megatron_r1.config.sglang import SGLangConfig, SlurmConfig
from megatron_r1.errors import ConfigError, NoRolloutCapacity
from megatron_r1.rollout.sglang.client import Endpoint
from megatron_r1.rollout.sglang.servers import discovery as sources
from megatron_r1.rollout.sglang.servers.slurm import addresses, expand, wait_for

PLAIN = {"SLURM_JOB_NODELIST": "node[01-03]"}
MIXED = {
    "SLURM_JOB_NODELIST": "cpu-1",
    "SLURM_JOB_NODELIST_HET_GROUP_0": "cpu-1",
    "SLURM_JOB_NODELIST_HET_GROUP_1": "gpu[7,9]",
}
WRITTEN = [
    "n1", "n1,n2", "n[0-3]", "n[01-03,7]", "n[0001-0003,00005]", "n[9-11]", "n[09-11]", "n[099-101]", "n[1-010]",
    "n[9-010]", "n[01,1]", "a[0-1]b[0-1]", "a[2,1][4,3]", "a[0-1]b[0-1]c[0-1]", "x[0-1]y[00-01,7]z[3]", "a,[1-2]",
    "n[0-1],m[8-10],z", "n2,n1,n1", "n[5,3-4]", "rack-1.row_2-n[08-12]", "a[1-3]-[1-2,5]_[0-1].[7]",
]  # fmt: skip


def drawn(seed: int) -> str:
    """A host list of several names with up to three brackets."""
    draw = random.Random(seed)

    def number() -> str:
        return f"{draw.randrange(120):0{draw.randint(1, 4)}d}"

    def bracket() -> str:
        parts = []
        for _ in range(draw.randint(1, 3)):
            first = number()
            last = f"{int(first) + draw.randrange(12):0{draw.randint(1, 4)}d}"
            parts.append(draw.choice([first, f"{first}-{last}"]))
        return f"[{','.join(parts)}]"

    def name() -> str:
        pieces = [draw.choice(["n", "gpu", "a-b", "r.c", "x_"]) for _ in range(draw.randint(1, 3))]
        return "".join(piece + bracket() for piece in pieces) if draw.random() < 0.8 else pieces[0] + number()

    return ",".join(name() for _ in range(draw.randint(1, 3)))


@pytest.mark.skipif(not shutil.which("scontrol"), reason="needs SLURM's scontrol (Debian: slurm-client)")
def test_host_lists_stand_for_the_names_that_slurm_gives(tmp_path):
    (tmp_path / "slurm.conf").write_text(
        "ClusterName=test\nSlurmctldHost=localhost\nNodeName=n0\nPartitionName=p Nodes=n0\n"
    )
    environment = os.environ | {"SLURM_CONF": str(tmp_path / "slurm.conf")}

    def by_slurm(host_list: str, show: str = "hostnames") -> list[str]:
        command = ["scontrol", "show", show, host_list]
        return subprocess.run(command, env=environment, text=True, capture_output=True, check=True).stdout.split()

    for host_list in WRITTEN + [drawn(seed) for seed in range(100)]:
        names, expected = expand(host_list), by_slurm(host_list)
        assert sorted(names) == sorted(expected), host_list
        # python-hostlist counts brackets like digits; scontrol does too where there are at most two in a name.
        in_order = max(part.count("[") for part in re.split(r",(?![^\[]*\])", host_list)) <= 2
        assert not in_order or names == expected, host_list
        # What SLURM itself writes of these names never has more than one.
        written = by_slurm(",".join(expected), "hostlist")
        assert max(part.count("[") for part in re.split(r",(?![^\[]*\])", *written)) <= 1
        assert expand(*written) == expected


def test_brackets_ranges_and_widths():
    """The same without SLURM at hand, for the ways in which they are written."""
    assert expand("n[8-11,02],m") == ["n8", "n9", "n10", "n11", "n02", "m"]
    assert expand("a[0-1]b[00-01,7]") == ["a0b00", "a0b01", "a0b7", "a1b00", "a1b01", "a1b7"]


@pytest.mark.parametrize(
    "host_list",
    ["n[3-1]", "n[a]", "n[]", "n[1-]", "n[-1]", "n[1-2-3]", "n[1", "n1]", "a[[0-1]]", "n m", "n/m"],
)
def test_what_is_no_host_list_is_refused(host_list):
    with pytest.raises(ConfigError, match="is no host list") as error:
        expand(host_list)
    assert "\n" not in str(error.value)


def test_servers_are_at_the_ports_of_the_chosen_nodes():
    job = SlurmConfig(nodes="job", skip_nodes=1, ports=[30000, 30001])
    assert addresses(job, PLAIN) == [
        "http://node02:30000", "http://node02:30001", "http://node03:30000", "http://node03:30001",
    ]  # fmt: skip
    component = SlurmConfig(nodes="component", component=1)
    assert addresses(component, MIXED) == ["http://gpu7:30000", "http://gpu9:30000"]


@pytest.mark.parametrize(
    ("config", "environment", "told"),
    [
        ({"nodes": "job"}, {}, "slurm.nodes=job: needs a SLURM job: SLURM_JOB_NODELIST is not set"),
        ({"nodes": "job"}, MIXED, "slurm.nodes=job: must be component: this job has components 0 to 1"),
        ({"nodes": "component", "component": 2}, MIXED, "slurm.component=2: must be one of this job's .* 0 to 1"),
        ({"nodes": "component"}, PLAIN, "slurm.component=0: must be one of .* none: it is not heterogeneous"),
        ({"nodes": "job", "skip_nodes": 3}, PLAIN, "slurm.skip_nodes=3: must be below the 3 nodes that there are"),
    ],
)
def test_a_job_without_such_nodes_is_an_error_of_one_line(config, environment, told):
    with pytest.raises(ConfigError, match=told) as error:
        addresses(SlurmConfig(**config), environment)
    assert "\n" not in str(error.value)


def test_options_that_do_not_fit_are_refused():
    for wrong in ({"ports": []}, {"ports": [1, 1]}, {"ports": [0]}, {"skip_nodes": -1}, {"nodes": "all"}):
        with pytest.raises(ConfigError):
            SlurmConfig(**wrong)
    with pytest.raises(ConfigError, match="slurm.nodes=job: must be none where"):
        SGLangConfig(addresses=["http://a:1"], slurm=SlurmConfig(nodes="job"))


def test_servers_of_the_job_are_waited_for(monkeypatch):
    for name, value in {sources.API_KEY: "user", sources.ADMIN_KEY: "admin", "SLURM_JOB_NODELIST": "localhost"}.items():
        monkeypatch.setenv(name, value)
    with socket.socket() as late:
        late.bind(("127.0.0.1", 0))
        port = late.getsockname()[1]
        config = SGLangConfig(slurm=SlurmConfig(nodes="job", ports=[port]), start_timeout_s=20)
        assert config.started_elsewhere
        with pytest.raises(NoRolloutCapacity, match=rf"localhost:{port}: no server answers after 0 s: \w"):
            wait_for([f"http://localhost:{port}"], 0)
        timer = threading.Timer(0.3, late.listen)
        began = time.monotonic()
        timer.start()
        try:
            assert sources.external_endpoints(config) == [Endpoint(f"http://localhost:{port}", "user", "admin")]
        finally:
            timer.join()
        assert time.monotonic() - began >= 0.3
