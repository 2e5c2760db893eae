"""Runs one program in the sandbox, from its start until all its processes have ended.

The sandbox isolates files, network, processes, users, environment, tracing and namespaces of the machine (command.py,
seccomp.py), and limits wall time, processor time, memory, disk, number of files, processes and output. A program's
daemons end with it: it has a process namespace of its own, and `run` waits for the end of that.

The sandbox does not protect from faults of the kernel or from timing side channels. The memory of all processes
together is checked every 50 ms, so a program can exceed that limit for that long.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import selectors
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

from megatron_r1.config.reward import SandboxConfig
from megatron_r1.errors import PlatformError
from megatron_r1.rewards.sandbox.command import PYTHON, SLOTS, WORK, bwrap_command, find_tools
from megatron_r1.rewards.sandbox.seccomp import seccomp_filter
from megatron_r1.rewards.sandbox.usage import files_made, held

WATCHED_AFTER_S, WATCHED_EVERY_S = 0.1, 0.05
MOST_FILES = 10_000
"""Most files in the writable folder: each costs the kernel memory, whatever its size."""
OWN_PROCESSES = 4
"""Seconds for the sandbox itself."""
PATIENCE_S = 20.0
"""Seconds for the kernel to end all processes after a kill."""
CHUNK = 1 << 16


class SandboxDown(Exception):
    """The sandbox itself failed: nothing is known about the program."""


@dataclass(frozen=True)
class Finished:
    """Result of a run of a program."""

    ended: str
    """itself where the program ended by itself, else the limit that ended it: time, memory, disk, processes, output."""
    code: int
    """Exit status, 128 + n for signal n; meaningful only where the program ended by itself."""
    output: bytes
    errors: bytes

    @property
    def well(self) -> bool:
        """Whether the program ended by itself with exit status 0."""
        return self.ended == "itself" and self.code == 0


_FREE_SLOTS: queue.SimpleQueue[int] = queue.SimpleQueue()
for _slot in range(SLOTS):
    _FREE_SLOTS.put(_slot)


@contextlib.contextmanager
def own_slot() -> Iterator[int]:
    """A slot number that no other running program of this process has, in any sandbox.

    The program's uid is made from it: with the same uid, one program's processes would count towards another's limit.
    """
    slot = _FREE_SLOTS.get()
    try:
        yield slot
    finally:
        _FREE_SLOTS.put(slot)


class Sandbox:
    """Runs programs, a bounded number at the same time; may be used by many threads."""

    def __init__(self, config: SandboxConfig):
        """Raises PlatformError: the sandbox does not work on this machine; programs are never run without it."""
        self.config = config
        self._tools, self._filter = find_tools(), seccomp_filter()
        self._at_once = threading.Semaphore(config.max_parallel)
        try:
            tried = self.run([*PYTHON, "-c", "print(6 * 7)"])
        except SandboxDown as error:
            raise PlatformError(f"programs are run in a sandbox only, and it does not work here: {error}") from None
        if tried.output != b"42\n":
            message = " ".join(tried.errors.decode(errors="replace").split()) or f"exit {tried.code}, {tried.ended}"
            raise PlatformError(f"programs are run in a sandbox only, and it does not work here: {message}")

    def run(
        self,
        program: list[str],
        files: dict[str, bytes] | None = None,
        stdin: bytes = b"",
        output_bytes: int | None = None,
        memory_mib: int | None = None,
    ) -> Finished:
        """Run a program until it ends or exceeds a limit.

        Args:
            program: command, with paths inside the sandbox.
            files: path inside -> contents, readable and executable.
            stdin: standard input.
            output_bytes, memory_mib: limits in place of the configured ones.

        Raises:
            SandboxDown: the sandbox failed, which is not the program's fault.
        """
        run = _Run(self.config, output_bytes or self.config.output_kib << 10, memory_mib or self.config.memory_mib)
        try:
            with (
                self._at_once,
                own_slot() as slot,
                self._started(program, files or {}, slot, run.memory_mib) as (process, status, gate),
            ):
                return run.to_the_end(process, status, gate, stdin)
        except OSError as error:
            raise SandboxDown(f"{error.strerror or error}") from error

    @contextlib.contextmanager
    def _started(
        self, program: list[str], files: dict[str, bytes], slot: int, memory_mib: int
    ) -> Iterator[tuple[subprocess.Popen[bytes], int, int]]:
        """The process of bubblewrap, the descriptor of its status, and the one that makes it start the program."""
        with ExitStack() as stack:
            (read_status, write_status), (read_gate, write_gate) = os.pipe(), os.pipe()
            stack.callback(os.close, read_status)
            stack.callback(os.close, write_gate)
            with ExitStack() as passed:
                passed.callback(os.close, write_status)
                passed.callback(os.close, read_gate)
                contents = {path: _in_memory(path, body, passed) for path, body in files.items()}
                seccomp = _in_memory("seccomp", self._filter, passed)
                command = bwrap_command(
                    self._tools, self.config, slot, program, contents, write_status, read_gate, seccomp, memory_mib
                )
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    pass_fds=(*contents.values(), write_status, read_gate, seccomp),
                    env={},
                    cwd="/",
                )
            stack.enter_context(process)
            stack.callback(process.kill)
            yield process, read_status, write_gate


def _in_memory(name: str, body: bytes, stack: ExitStack) -> int:
    descriptor = os.memfd_create(os.path.basename(name))
    stack.callback(os.close, descriptor)
    with open(descriptor, "wb", closefd=False) as file:
        file.write(body)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


class _Run:
    """One running program: feeds its input, reads its output, watches its limits."""

    def __init__(self, config: SandboxConfig, output_bytes: int, memory_mib: int):
        self.config, self.output_bytes, self.memory_mib = config, output_bytes, memory_mib
        self._streams: dict[str, bytearray] = {"output": bytearray(), "errors": bytearray(), "status": bytearray()}
        self._init: int | None = None  # pidfd of the first process of the program's namespace
        self._init_pid = 0

    def to_the_end(self, process: subprocess.Popen[bytes], status: int, gate: int, stdin: bytes) -> Finished:
        """Feed, read and watch the program, then end all its processes."""
        with ExitStack() as stack:
            stack.callback(self._close)
            exited = os.pidfd_open(process.pid)
            stack.callback(os.close, exited)
            ended = self._attend(process, status, gate, exited, stdin)
            self._kill(process)
            self._drain(process, status)
        code = self._exit_code()
        if code is None and ended == "itself":
            message = " ".join(self._streams["errors"].decode(errors="replace").split())
            raise SandboxDown(message or f"bubblewrap ended with {process.returncode}")
        return Finished(ended, code or 0, bytes(self._streams["output"]), bytes(self._streams["errors"]))

    def _attend(self, process: subprocess.Popen[bytes], status: int, gate: int, exited: int, stdin: bytes) -> str:
        assert process.stdin and process.stdout and process.stderr
        started, unsent = time.monotonic(), memoryview(stdin)
        with selectors.DefaultSelector() as selector:
            for stream, name in ((process.stdout, "output"), (process.stderr, "errors"), (status, "status")):
                os.set_blocking(stream if isinstance(stream, int) else stream.fileno(), False)
                selector.register(stream, selectors.EVENT_READ, name)
            selector.register(exited, selectors.EVENT_READ, "exited")
            os.set_blocking(process.stdin.fileno(), False)
            if unsent:
                selector.register(process.stdin, selectors.EVENT_WRITE, "stdin")
            else:
                process.stdin.close()
            while (passed := time.monotonic() - started) < self.config.wall_s:
                names = set()
                watched = WATCHED_EVERY_S if passed > WATCHED_AFTER_S else WATCHED_AFTER_S
                for key, _ in selector.select(min(watched, self.config.wall_s - passed)):
                    names.add(key.data)
                    if key.data == "stdin":
                        unsent = self._write_stdin(process, unsent)
                        if not unsent:
                            selector.unregister(process.stdin)
                            process.stdin.close()
                    elif key.data != "exited" and not self._read(key.fd, key.data):
                        selector.unregister(key.fileobj)
                if self._init is None and self._find_init(process):
                    os.write(gate, b"\n")  # not before its end can be waited for
                if len(self._streams["output"]) > self.output_bytes or len(self._streams["errors"]) > self.output_bytes:
                    return "output"
                if "exited" in names:
                    return "itself"
                if passed > WATCHED_AFTER_S and (over := self._over()):
                    return over
        return "time"

    @staticmethod
    def _write_stdin(process: subprocess.Popen[bytes], unsent: memoryview) -> memoryview:
        assert process.stdin
        try:
            return unsent[os.write(process.stdin.fileno(), unsent[:CHUNK]) :]
        except BlockingIOError:
            return unsent
        except OSError:  # the program has closed its standard input
            return unsent[:0]

    def _read(self, descriptor: int, name: str) -> bool:
        """Read what is available; returns whether there may be more."""
        try:
            data = os.read(descriptor, CHUNK)
        except BlockingIOError:
            return True
        self._streams[name] += data
        return bool(data)

    def _drain(self, process: subprocess.Popen[bytes], status: int) -> None:
        """Read the rest of the pipes after all processes have ended, up to the limits."""
        assert process.stdout and process.stderr
        for name, descriptor in (
            ("output", process.stdout.fileno()),
            ("errors", process.stderr.fileno()),
            ("status", status),
        ):
            before = -1
            while before < len(self._streams[name]) <= self.output_bytes:
                before = len(self._streams[name])
                self._read(descriptor, name)

    def _find_init(self, process: subprocess.Popen[bytes]) -> bool:
        """Open a pidfd of the namespace's first process once bubblewrap has reported its pid; returns whether."""
        for line in self._streams["status"].splitlines():
            pid = json.loads(line).get("child-pid") if line.endswith(b"}") else None
            if not pid:
                continue
            with contextlib.suppress(OSError):
                pidfd = os.pidfd_open(pid)
                # The pid may have been reused by another process; bubblewrap has only this one child.
                if _parent(pid) == process.pid:
                    self._init, self._init_pid = pidfd, pid
                else:
                    os.close(pidfd)
        return self._init is not None

    def _over(self) -> str:
        """The limit that all processes of the program together exceed; empty for none."""
        if self._init is None:
            return ""
        most = self.config.processes + OWN_PROCESSES
        memory, threads = held(self._init_pid, most)
        if memory > self.memory_mib << 20:
            return "memory"
        if threads > most:  # where the kernel does not enforce the limit, as for some kinds of root
            return "processes"
        made = files_made(f"/proc/{self._init_pid}/root{WORK}", self.config.disk_mib << 20)
        return "disk" if made > MOST_FILES else ""

    def _kill(self, process: subprocess.Popen[bytes]) -> None:
        """End all processes of the program; returns when the kernel has removed them."""
        if self._init is None:
            self._find_init(process)
        if self._init is None:
            process.kill()
        else:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._init, signal.SIGKILL)
            with selectors.DefaultSelector() as gone:
                gone.register(self._init, selectors.EVENT_READ)
                if not gone.select(PATIENCE_S):
                    raise SandboxDown("a killed program does not end")
        process.wait(PATIENCE_S)

    def _exit_code(self) -> int | None:
        """The program's exit status; None where bubblewrap did not start it."""
        for line in self._streams["status"].splitlines():
            if b"exit-code" in line:
                return int(json.loads(line)["exit-code"])
        return None

    def _close(self) -> None:
        if self._init is not None:
            os.close(self._init)


def _parent(pid: int) -> int:
    with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
        return int(file.read().rpartition(")")[2].split()[1])
