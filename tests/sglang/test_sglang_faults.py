"""Servers that cannot start, and servers whose program is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_r1.config.sglang import SGLangConfig
from megatron_r1.errors import NoRolloutCapacity
from megatron_r1.rollout.sglang.engine import SGLangEngine
from megatron_r1.rollout.sglang.servers.process import Server, group_members

pytestmark = [pytest.mark.sglang]

PROGRAM = """
import json, sys, time
from pathlib import Path
from megatron_r1.config.sglang import ServerConfig, SGLangConfig
from megatron_r1.rollout.sglang.servers.arguments import server_arguments, server_environment
from megatron_r1.rollout.sglang.servers.process import Server
arguments = server_arguments(Path(sys.argv[1]), SGLangConfig(max_total_tokens=4096), device="cpu", dtype="float32",
                             context_length=64, version="initial")
server = Server(arguments, server_environment("cpu", ServerConfig()), Path(sys.argv[2]))
while not server.accepts():
    server.check()
    time.sleep(0.1)
print(json.dumps({"pid": server.process.pid, "folder": str(server.folder)}), flush=True)
time.sleep(600)
"""


def wait_for(condition, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def test_killed_program_leaves_no_server(models, tmp_path):
    folders, _ = models
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", PROGRAM, str(folders[0]), str(tmp_path / "server.log")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as program:
        started = json.loads(program.stdout.readline())
        try:
            assert len(group_members(started["pid"])) >= 3, "SGLang spawned no processes"
            program.send_signal(signal.SIGKILL)
            program.wait()
            assert wait_for(lambda: not group_members(started["pid"]), 10)
            assert not Path(started["folder"]).exists()
        finally:
            program.kill()
            if group_members(started["pid"]):
                os.killpg(started["pid"], signal.SIGKILL)


def start(folder: Path, logs: Path) -> str:
    """What a server of this folder says when it does not start."""
    with pytest.raises(NoRolloutCapacity) as error:
        SGLangEngine(folder, SGLangConfig(), logs, "cpu", "float32", context_length=64)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_folder_without_a_model_is_refused_before_a_server_starts(tmp_path):
    began = time.monotonic()
    assert "config.json" in start(tmp_path / "nothing", tmp_path / "logs")
    assert time.monotonic() - began < 1.0


def test_folder_that_sglang_cannot_serve_is_one_line_with_the_log(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "no_such_model", "architectures": ["NoSuchModel"]}')
    message = start(tmp_path, tmp_path / "logs")
    assert "no_such_model" in message
    assert str(tmp_path / "logs" / "server-0.log") in message


def test_what_a_server_compiled_outlives_it_where_home_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/no/such/home")
    server = Server({}, {}, tmp_path / "logs" / "server-0.log")
    deadline = time.monotonic() + 20
    while not (written := Path(f"/proc/{server.process.pid}/environ").read_bytes()) and time.monotonic() < deadline:
        time.sleep(0.01)  # Linux shows none before the new program is in place
    environment = written.split(b"\0")
    server.close()
    caches = tmp_path / "logs" / "caches"
    assert f"HOME={caches}".encode() in environment and caches.is_dir() and not server.folder.exists()
