"""Servers as forks of a process that has imported SGLang (fork_server.py), for the program that starts them."""

from __future__ import annotations

import atexit
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import IO

from megatron_r1.files import Lock
from megatron_r1.rollout.sglang.servers.fork_server import SIZE

KEEP_ENVIRON = "SPT_NOENV"
"""Has setproctitle write no title over /proc/PID/environ, by which a scheduler's processes are found."""
UNKNOWN = 255
"""Exit status of a server whose fork server has ended before it."""


class ForkServer:
    """A process that forks servers; it ends with `close` and with this program.

    Args:
        environment: that it imports SGLang in.
        log: where the output of the imports goes.
    """

    def __init__(self, environment: Mapping[str, str], log: IO[bytes]):
        self._owner, self._sending = os.getpid(), threading.Lock()
        self._control, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "megatron_r1.rollout.sglang.servers.fork_server"],
                stdin=theirs.fileno(),
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**environment, KEEP_ENVIRON: "1"},
                start_new_session=True,
            )
        atexit.register(self.close)

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def fork(self, environment: Mapping[str, str], log: IO[bytes], lock: Lock) -> ForkedProcess:
        """Have a server started, in a session of its own."""
        stdin, ours = os.pipe()
        status, theirs = os.pipe()
        content = json.dumps(dict(environment)).encode()
        with self._sending, suppress(BrokenPipeError, ConnectionResetError):  # its end is read from the pipe
            descriptors = [stdin, log.fileno(), lock.descriptor, theirs]
            socket.send_fds(self._control, [SIZE.pack(len(content))], descriptors)
            self._control.sendall(content)
        os.close(stdin)
        os.close(theirs)
        return ForkedProcess(self._process, os.fdopen(ours, "wb"), os.fdopen(status, "rb", buffering=0))

    def close(self) -> None:
        """End it, and with it its servers; may be called twice."""
        atexit.unregister(self.close)
        if os.getpid() == self._owner:  # and not a fork of the program
            self._control.close()
            self._process.kill()
            self._process.wait()


class ForkedProcess:
    """A forked server's process: what subprocess.Popen is of one that was executed."""

    def __init__(self, fork_server: subprocess.Popen[bytes], stdin: IO[bytes], status: IO[bytes]):
        self.stdin: IO[bytes] | None = stdin
        self.returncode: int | None = None
        self._fork_server, self._status, self._reading = fork_server, status, threading.Lock()
        self._pid = 0

    @property
    def pid(self) -> int:
        """Its process id; until it is forked the fork server's, whose death ends the start too."""
        self.poll()
        return self._pid or self._fork_server.pid

    def poll(self) -> int | None:
        """The exit status, negative of a signal; None while the process runs."""
        return self._read_within(0.0)

    def wait(self, timeout: float) -> int:
        """Wait for the process's end; returns its exit status.

        Raises:
            subprocess.TimeoutExpired: it runs on.
        """
        if (found := self._read_within(timeout)) is None:
            raise subprocess.TimeoutExpired(f"server {self.pid}", timeout)
        return found

    def kill(self) -> None:
        """Kill the process, if it runs."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)

    def _read_within(self, seconds: float) -> int | None:
        deadline = time.monotonic() + seconds
        with self._reading:
            while self.returncode is None and self._readable(deadline - time.monotonic()):
                line = self._status.readline()
                if line and not self._pid:
                    self._pid = int(line)
                elif line:
                    self.returncode = int(line)
                else:
                    self.returncode = UNKNOWN if self._pid else self._fork_server.wait()
            return self.returncode

    def _readable(self, seconds: float) -> bool:
        return bool(select.select([self._status], [], [], max(0.0, seconds))[0])


_fork_servers: dict[tuple[object, ...], ForkServer] = {}
_starting = threading.Lock()


def fork_server(environment: Mapping[str, str], kind: Mapping[str, str], log: IO[bytes]) -> ForkServer:
    """This program's fork server for servers of one kind, started if there is none.

    Args:
        environment: that a new one imports SGLang in.
        kind: the variables of servers that SGLang may read while it is imported.
        log: where the output of a new one goes.
    """
    key = (os.getpid(), *sorted(kind.items()))
    with _starting:
        if key not in _fork_servers or _fork_servers[key].ended:
            _fork_servers[key] = ForkServer(environment, log)
        return _fork_servers[key]
