"""Servers that are forked from one process: each is one of its own, and they end with it."""

import os
import re
import signal
import time
from pathlib import Path

import psutil
import pytest

from megatron_r1.config.sglang import PoolConfig, ServerConfig, SGLangConfig
from megatron_r1.rollout.engine import Request, Sampling
from megatron_r1.rollout.sglang.engine import SGLangEngine
from megatron_r1.rollout.sglang.servers.arguments import server_environment
from megatron_r1.rollout.sglang.servers.forked import UNKNOWN
from megatron_r1.rollout.sglang.servers.process import Server, group_members

pytestmark = [pytest.mark.sglang]
REQUESTS = [Request(str(i), (5, 6, 7)) for i in range(4)]
VARIABLES = server_environment("cpu", ServerConfig())
FREE = Sampling(temperature=1.0, top_p=1.0, max_tokens=12, stop_tokens=(), seed=0)


@pytest.fixture(scope="module")
def engine(models, tmp_path_factory):
    config = SGLangConfig(
        servers=2, max_running_requests=8, max_total_tokens=4096, pool=PoolConfig(health_interval_s=0.5)
    )
    logs = tmp_path_factory.mktemp("logs")
    with SGLangEngine(models[0][0], config, logs, "cpu", "float32", context_length=64) as engine:
        yield engine


def parents(engine) -> set[int]:
    return {psutil.Process(server.process.pid).ppid() for server in engine.servers}


def open_pipes(pid: int) -> set[str]:
    links = {os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir() if path.exists() or path.is_symlink()}
    return {link for link in links if link.startswith("pipe:")}


def test_two_servers_share_a_parent_and_nothing_else(engine):
    first, second = engine.servers
    (parent,) = parents(engine)
    assert parent not in (os.getpid(), first.process.pid, second.process.pid)
    for server in engine.servers:
        pid = server.process.pid
        assert os.getsid(pid) == os.getpgid(pid) == pid
        assert "servers.launch" in " ".join(psutil.Process(pid).cmdline())
        of_server = [psutil.Process(one).environ().get("PATH") for one in group_members(pid)]
        assert len(of_server) > 1 and {*of_server} == {os.environ["PATH"]}, "/proc tells whose they are"
        assert os.readlink(f"/proc/{pid}/fd/1") == os.readlink(f"/proc/{pid}/fd/2") == str(server.log)
    seeds = {re.search(r"'random_seed': (\d+)", server.log.read_text())[1] for server in engine.servers}
    assert len(seeds) == 2, "two servers draw the same tokens"
    # A descriptor of the other's lifeline would keep a server alive after the program.
    assert not open_pipes(first.process.pid) & open_pipes(second.process.pid)
    # One of the other's status would hide that the fork server has ended.
    for server in engine.servers:
        assert not open_pipes(server.process.pid) & open_pipes(parent)


def test_a_server_that_fails_says_its_status(engine, tmp_path):
    failing = Server({"no_such_argument": 1}, VARIABLES, tmp_path / "log")
    try:
        assert failing.process.wait(60) == 1
        assert "no_such_argument" in failing.exit_reason() and "status 1" in failing.exit_reason()
    finally:
        failing.close()


def test_servers_end_with_the_fork_server_and_come_back_from_another(engine):
    (parent,), restarts = parents(engine), engine.restarts
    before = list(engine.servers)
    os.kill(parent, signal.SIGKILL)
    assert [server.process.wait(20) for server in before] == [UNKNOWN, UNKNOWN]
    deadline = time.monotonic() + 20
    while any(group_members(server.process.pid) for server in before):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    deadline = time.monotonic() + 90
    while engine.restarts < restarts + 2 or engine.states() != ["", ""]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert parents(engine) != {parent} and len(parents(engine)) == 1
    assert len(engine.generate(REQUESTS, FREE)) == len(REQUESTS)


def test_a_fork_server_that_cannot_import_is_one_line(tmp_path):
    (tmp_path / "sglang").mkdir()
    (tmp_path / "sglang" / "__init__.py").write_text("raise ImportError('a broken installation')")
    broken = os.pathsep.join([str(tmp_path), VARIABLES.get("PYTHONPATH", "")])
    server = Server({}, VARIABLES | {"PYTHONPATH": broken}, tmp_path / "log")
    try:
        assert server.process.wait(60) == 1
        assert "a broken installation" in server.exit_reason()
    finally:
        server.close()


def test_a_start_can_be_given_up(tmp_path):
    """Before the server is forked: a fork server of its own kind has SGLang to import first."""
    server = Server({}, VARIABLES | {"KIND": "given up"}, tmp_path / "log")
    assert server.process.poll() is None
    fork_server = psutil.Process(server.process.pid)
    assert "fork_server" in " ".join(fork_server.cmdline())
    server.close()
    assert not fork_server.is_running() or fork_server.status() == psutil.STATUS_ZOMBIE
    assert not server.folder.exists() and server.ended
