"""Running one program in the sandbox, from its start until nothing of it is left.

Covered: files, network, processes, users, environment, tracing and namespaces of the machine (command.py, seccomp.py);
wall time, processor time, memory, disk, number of files, processes and output. A program's daemons die with it: it has
a process namespace of its own, whose end is waited for.

Not covered: faults of the kernel itself, and what can be told from timing. How much memory all its processes hold
together is looked at every 50 ms, so that a program can go over it for that long.
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
"""In the folder that can be written: each costs the kernel memory, whatever its size."""
OWN_PROCESSES = 4
"""Of the sandbox itself."""
PATIENCE_S = 20.0
"""For the kernel to have taken everything away after a kill."""
CHUNK = 1 << 16


class SandboxDown(Exception):
    """The sandbox itself did not work: nothing is known about the program."""


@dataclass(frozen=True)
class Finished:
    """How a program ended."""

    ended: str
    """itself, time, memory, disk, processes or output: by itself, or by which limit."""
    code: int
    """Exit status, 128 + n for signal n; of meaning where it ended by itself."""
    output: bytes
    errors: bytes

    @property
    def well(self) -> bool:
        """Whether it ended by itself and says that all went well."""
        return self.ended == "itself" and self.code == 0


_FREE_SLOTS: queue.SimpleQueue[int] = queue.SimpleQueue()
for _slot in range(SLOTS):
    _FREE_SLOTS.put(_slot)


@contextlib.contextmanager
def own_slot() -> Iterator[int]:
    """A number that no other program of this process has while this one runs, whichever sandbox it is in.

    It makes the user that a program is: with one user, one program's processes would count against another's limit.
    """
    slot = _FREE_SLOTS.get()
    try:
        yield slot
    finally:
        _FREE_SLOTS.put(slot)


class Sandbox:
    """Runs programs, a bounded number at the same time; may be used by many threads."""

    def __init__(self, config: SandboxConfig):
        """Raises PlatformError: the sandbox does not work on this machine, and nothing is run without it."""
        self.config = config
        self._tools, self._filter = find_tools(), seccomp_filter()
        self._at_once = threading.Semaphore(config.max_parallel)
        try:
            tried = self.run([*PYTHON, "-c", "print(6 * 7)"])
        except SandboxDown as error:
            raise PlatformError(f"programs are run in a sandbox only, and it does not work here: {error}") from None
        if tried.output != b"42\n":
            said = " ".join(tried.errors.decode(errors="replace").split()) or f"exit {tried.code}, {tried.ended}"
            raise PlatformError(f"programs are run in a sandbox only, and it does not work here: {said}")

    def run(
        self,
        program: list[str],
        files: dict[str, bytes] | None = None,
        given: bytes = b"",
        output_bytes: int | None = None,
        memory_mib: int | None = None,
    ) -> Finished:
        """Run a program to its end, or until it breaks a limit.

        Args:
            program: its command, of paths inside the sandbox.
            files: path inside -> contents, readable and executable.
            given: its standard input.
            output_bytes, memory_mib: limits in place of the configured ones.

        Raises:
            SandboxDown: it could not be run for no fault of its own.
        """
        run = _Run(self.config, output_bytes or self.config.output_kib << 10, memory_mib or self.config.memory_mib)
        try:
            with (
                self._at_once,
                own_slot() as slot,
                self._started(program, files or {}, slot, run.memory_mib) as (process, status, gate),
            ):
                return run.to_the_end(process, status, gate, given)
        except OSError as error:
            raise SandboxDown(f"{error.strerror or error}") from error

    @contextlib.contextmanager
    def _started(
        self, program: list[str], files: dict[str, bytes], slot: int, memory_mib: int
    ) -> Iterator[tuple[subprocess.Popen[bytes], int, int]]:
        """The process of bubblewrap, the descriptor from which its words are read, and the one that lets it go on."""
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
    """One program while it runs: what it is given, what it says, what it uses."""

    def __init__(self, config: SandboxConfig, output_bytes: int, memory_mib: int):
        self.config, self.output_bytes, self.memory_mib = config, output_bytes, memory_mib
        self._said: dict[str, bytearray] = {"output": bytearray(), "errors": bytearray(), "status": bytearray()}
        self._init: int | None = None  # pidfd of the first process of the program's namespace
        self._init_pid = 0

    def to_the_end(self, process: subprocess.Popen[bytes], status: int, gate: int, given: bytes) -> Finished:
        """Feed, read and watch it, and see that nothing of it is left."""
        with ExitStack() as stack:
            stack.callback(self._close)
            exited = os.pidfd_open(process.pid)
            stack.callback(os.close, exited)
            ended = self._attend(process, status, gate, exited, given)
            self._kill(process)
            self._drain(process, status)
        code = self._exit_code()
        if code is None and ended == "itself":
            said = " ".join(self._said["errors"].decode(errors="replace").split())
            raise SandboxDown(said or f"bubblewrap ended with {process.returncode}")
        return Finished(ended, code or 0, bytes(self._said["output"]), bytes(self._said["errors"]))

    def _attend(self, process: subprocess.Popen[bytes], status: int, gate: int, exited: int, given: bytes) -> str:
        assert process.stdin and process.stdout and process.stderr
        started, left = time.monotonic(), memoryview(given)
        with selectors.DefaultSelector() as selector:
            for stream, name in ((process.stdout, "output"), (process.stderr, "errors"), (status, "status")):
                os.set_blocking(stream if isinstance(stream, int) else stream.fileno(), False)
                selector.register(stream, selectors.EVENT_READ, name)
            selector.register(exited, selectors.EVENT_READ, "exited")
            os.set_blocking(process.stdin.fileno(), False)
            if left:
                selector.register(process.stdin, selectors.EVENT_WRITE, "given")
            else:
                process.stdin.close()
            while (passed := time.monotonic() - started) < self.config.wall_s:
                names = set()
                watched = WATCHED_EVERY_S if passed > WATCHED_AFTER_S else WATCHED_AFTER_S
                for key, _ in selector.select(min(watched, self.config.wall_s - passed)):
                    names.add(key.data)
                    if key.data == "given":
                        left = self._give(process, left)
                        if not left:
                            selector.unregister(process.stdin)
                            process.stdin.close()
                    elif key.data != "exited" and not self._read(key.fd, key.data):
                        selector.unregister(key.fileobj)
                if self._init is None and self._find_init(process):
                    os.write(gate, b"\n")  # not before its end can be waited for
                if len(self._said["output"]) > self.output_bytes or len(self._said["errors"]) > self.output_bytes:
                    return "output"
                if "exited" in names:
                    return "itself"
                if passed > WATCHED_AFTER_S and (over := self._over()):
                    return over
        return "time"

    @staticmethod
    def _give(process: subprocess.Popen[bytes], left: memoryview) -> memoryview:
        assert process.stdin
        try:
            return left[os.write(process.stdin.fileno(), left[:CHUNK]) :]
        except BlockingIOError:
            return left
        except OSError:  # it reads no more
            return left[:0]

    def _read(self, descriptor: int, name: str) -> bool:
        """Whether there may be more to read."""
        try:
            data = os.read(descriptor, CHUNK)
        except BlockingIOError:
            return True
        self._said[name] += data
        return bool(data)

    def _drain(self, process: subprocess.Popen[bytes], status: int) -> None:
        """What is left in the pipes after everything has ended, up to the limits."""
        assert process.stdout and process.stderr
        for name, descriptor in (
            ("output", process.stdout.fileno()),
            ("errors", process.stderr.fileno()),
            ("status", status),
        ):
            before = -1
            while before < len(self._said[name]) <= self.output_bytes:
                before = len(self._said[name])
                self._read(descriptor, name)

    def _find_init(self, process: subprocess.Popen[bytes]) -> bool:
        """Take hold of the namespace's first process, once bubblewrap has said which it is; whether it was found."""
        for line in self._said["status"].splitlines():
            pid = json.loads(line).get("child-pid") if line.endswith(b"}") else None
            if not pid:
                continue
            with contextlib.suppress(OSError):
                pidfd = os.pidfd_open(pid)
                # A number may have passed on to another process; bubblewrap has only this one child.
                if _parent(pid) == process.pid:
                    self._init, self._init_pid = pidfd, pid
                else:
                    os.close(pidfd)
        return self._init is not None

    def _over(self) -> str:
        """Which limit all processes of the program together break."""
        if self._init is None:
            return ""
        most = self.config.processes + OWN_PROCESSES
        memory, threads = held(self._init_pid, most)
        if memory > self.memory_mib << 20:
            return "memory"
        if threads > most:  # where the kernel does not hold the limit, as it does not for every kind of root
            return "processes"
        made = files_made(f"/proc/{self._init_pid}/root{WORK}", self.config.disk_mib << 20)
        return "disk" if made > MOST_FILES else ""

    def _kill(self, process: subprocess.Popen[bytes]) -> None:
        """End what is left of it; returns when the kernel has taken all its processes away."""
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
        """The program's exit status; None where bubblewrap never got as far as starting it."""
        for line in self._said["status"].splitlines():
            if b"exit-code" in line:
                return int(json.loads(line)["exit-code"])
        return None

    def _close(self) -> None:
        if self._init is not None:
            os.close(self._init)


def _parent(pid: int) -> int:
    with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
        return int(file.read().rpartition(")")[2].split()[1])
