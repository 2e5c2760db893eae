"""One SGLang server as a process: on its endpoint's host, else on the loopback with fresh keys.

On a CPU it is forked from a process that has imported SGLang for all servers of this program (fork_server.py).

It is killed with all that it spawned.

The server leads a process group of its own. It ends with `close`, with the interpreter, and with the death of this
process however that comes (launch.py watches its standard input). Its output goes to a log file.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

import psutil

import megatron_r1
from megatron_r1.errors import NoRolloutCapacity
from megatron_r1.platform.launcher import without_launcher
from megatron_r1.platform.ports import reserve_ports
from megatron_r1.platform.temporary import home_for_caches
from megatron_r1.rollout.sglang.client import Endpoint
from megatron_r1.rollout.sglang.cpu import plugin as cpu
from megatron_r1.rollout.sglang.servers import leftovers
from megatron_r1.rollout.sglang.servers.forked import ForkedProcess, fork_server

CLOSE_TIMEOUT_S = 20.0
CACHES = "caches"
"""Folder beside the logs: HOME of servers whose user has none that can be written."""
HOST = "127.0.0.1"
NOISE = ("Traceback", "File ", "warn", "^^^")
HARMLESS = ("KeyError: '/", "/freeze_gc")
"""Errors that healthy servers write to their logs."""


class Server:
    """A running server process.

    Args:
        arguments: fields of SGLang's `ServerArgs`, without address and keys.
        environment: variables added to this process's own.
        log: file that the server's output is appended to.
        endpoint: address and keys, of a server that ran before; without it they are new.
    """

    def __init__(
        self,
        arguments: Mapping[str, Any],
        environment: Mapping[str, str],
        log: Path,
        endpoint: Endpoint | None = None,
    ):
        self.log = log
        self.endpoint = endpoint or new_endpoints(1)[0]
        split = urlsplit(self.endpoint.url)
        self.host, self.port = split.hostname or HOST, split.port or 0
        self.folder, self._lock = leftovers.new_folder()
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as output:
            self._log_start = output.tell()
            self.process = self._start(environment, output)
        atexit.register(self.close)
        keys = {"api_key": self.endpoint.api_key, "admin_api_key": self.endpoint.admin_key}
        self._send({**arguments, "host": self.host, "port": self.port, **keys, "parent": os.getpid()})

    @property
    def url(self) -> str:
        return self.endpoint.url

    @property
    def ended(self) -> bool:
        """Whether the server's process has ended."""
        return self.process.poll() is not None

    def check(self) -> None:
        """Raise NoRolloutCapacity, with the reason from the log, when the server's process has ended."""
        if self.ended:
            raise NoRolloutCapacity(self.exit_reason())

    def exit_reason(self) -> str:
        """Status and last error of a process that has ended."""
        return f"SGLang server ended with status {self.process.returncode}: {self.failure_line()}"

    def accepts(self) -> bool:
        """Whether something listens on the server's port."""
        with socket.socket() as probe:
            probe.settimeout(1.0)
            # A socket that connects to a free port may be given that very port, and then it talks to itself.
            return probe.connect_ex((self.host, self.port)) == 0 and probe.getsockname() != probe.getpeername()

    def failure_line(self) -> str:
        """The line of the log that says most about a failure, with the log's path."""
        with open(self.log, "rb") as file:
            file.seek(self._log_start)
            lines = file.read()[-64_000:].decode(errors="replace").splitlines()
        messages = [line.strip() for line in lines if line.strip() and not line.strip().startswith(NOISE)]
        errors = [line for line in messages if "Error" in line and not any(one in line for one in HARMLESS)]
        return f"{(errors or messages or ['it wrote nothing'])[-1][:400]} (log: {self.log})"

    def close(self) -> None:
        """Kill the process group, wait for its end and remove the server's temporary folder; may be called twice."""
        atexit.unregister(self.close)
        if not self.folder.exists():
            return
        segments = leftovers.mapped_segments(self.process.pid)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        if self.process.stdin:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
        self.process.wait(CLOSE_TIMEOUT_S)
        _wait_for_group(self.process.pid)
        leftovers.remove(self.folder, segments)
        self._lock.close()

    def _start(self, added: Mapping[str, str], output: IO[bytes]) -> subprocess.Popen[bytes] | ForkedProcess:
        environment = self._environment(added)
        if cpu.MARK in added:
            common = {name: value for name, value in environment.items() if name not in cpu.READ_LATE}
            kind = {name: value for name, value in common.items() if name in {*added, "HOME", "PYTHONPATH"}}
            forking = fork_server(common | {"TMPDIR": tempfile.gettempdir()}, kind, output)
            return forking.fork(environment, output, self._lock)
        return subprocess.Popen(
            [sys.executable, "-m", "megatron_r1.rollout.sglang.servers.launch"],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
            pass_fds=[self._lock.descriptor],
        )

    def _environment(self, added: Mapping[str, str]) -> dict[str, str]:
        # Kernels that a server compiles are there for the next one, also where the user's home cannot be written.
        if home := home_for_caches(self.log.parent.resolve() / CACHES):
            Path(home["HOME"]).mkdir(parents=True, exist_ok=True)
        # A server's ranks are none of this program's.
        inherited = without_launcher(os.environ) | home
        return {**inherited, **added, "PYTHONPATH": _python_path(added), "TMPDIR": str(self.folder)}

    def _send(self, arguments: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it is dead already: `check` says why
            self.process.stdin.write(json.dumps(arguments).encode() + b"\n")
            self.process.stdin.flush()


def new_endpoints(count: int) -> list[Endpoint]:
    """Free ports of the loopback, with fresh keys that they share."""
    api_key, admin_key = secrets.token_hex(32), secrets.token_hex(32)
    return [Endpoint(f"http://{HOST}:{port}", api_key, admin_key) for port in reserve_ports(count)]


def _wait_for_group(group: int) -> None:
    """Return when no process of a killed group runs any more, so that ports and memory are free."""
    deadline = time.monotonic() + CLOSE_TIMEOUT_S
    while group_members(group) and time.monotonic() < deadline:
        time.sleep(0.05)


def group_members(group: int) -> list[int]:
    """Ids of the running processes of a process group; the dead that nobody has collected do not count."""
    members = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                members.append(process.pid)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return members


def _python_path(environment: Mapping[str, str]) -> str:
    """This package first, then what the environment names, then what this process was given."""
    package_root = str(Path(megatron_r1.__file__).resolve().parents[1])
    parts = [package_root, environment.get("PYTHONPATH", ""), os.environ.get("PYTHONPATH", "")]
    return os.pathsep.join(part for part in parts if part)
