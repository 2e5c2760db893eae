"""The sandbox by itself: what a program gets, what it may use, and that nothing runs without one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from megatron_r1.config.reward import SandboxConfig
from megatron_r1.errors import PlatformError
from megatron_r1.rewards.sandbox import command, inside, run
from megatron_r1.rewards.sandbox.command import PYTHON
from megatron_r1.rewards.sandbox.run import Finished, Sandbox, SandboxDown
from megatron_r1.rewards.sandbox.seccomp import seccomp_filter
from tests.support.sandboxes import survivors

needs_bubblewrap = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    return Sandbox(SandboxConfig(wall_s=20.0, output_kib=64, memory_mib=128))


def python(sandbox: Sandbox, text: str, stdin: bytes = b"") -> Finished:
    return sandbox.run([*PYTHON, "/program.py"], {"/program.py": text.encode()}, stdin)


def test_what_executes_programs_refuses_to_do_so_outside():
    alone = subprocess.run(
        [sys.executable, inside.__file__, "f"], capture_output=True, text=True, check=False, input="{}"
    )
    assert alone.returncode == 1 and alone.stderr == "inside.py: runs in the sandbox only\n"


def test_nothing_is_run_without_bubblewrap(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PlatformError, match="bwrap is missing: install bubblewrap") as refused:
        Sandbox(SandboxConfig())
    assert "\n" not in str(refused.value)


@needs_bubblewrap
def test_nothing_is_run_where_bubblewrap_does_not_work(monkeypatch, tmp_path):
    for name, body in (("bwrap", "echo no namespaces here >&2; exit 1"), ("prlimit", ""), ("setpriv", "")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PlatformError, match="does not work here: no namespaces here"):
        Sandbox(SandboxConfig())


def test_an_unknown_architecture_is_refused():
    with pytest.raises(PlatformError, match="x86_64 and aarch64 only, this is riscv64"):
        seccomp_filter("riscv64")
    assert len(seccomp_filter("aarch64")) % 8 == 0
    assert seccomp_filter("aarch64") != seccomp_filter("x86_64")


@needs_bubblewrap
def test_a_program_reads_prints_and_ends(sandbox):
    assert python(sandbox, "print(input()[::-1])", b"abc\n") == Finished("itself", 0, b"cba\n", b"")
    failed = python(sandbox, "import sys\nprint(1)\nsys.exit('no')")
    assert (failed.ended, failed.code, failed.output, failed.errors, failed.well) == (
        "itself",
        1,
        b"1\n",
        b"no\n",
        False,
    )
    assert python(sandbox, "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)").code == 137
    stdin = os.urandom(1 << 20).hex().encode()
    assert python(sandbox, "import sys\nprint(len(sys.stdin.read()))", stdin).output == b"2097152\n"
    assert python(sandbox, "print(1)", stdin).output == b"1\n"  # which reads nothing


@needs_bubblewrap
def test_what_a_program_sees(sandbox, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "1")
    shown = """
import os
print(os.getuid() != 0, os.getgroups(), sorted(os.environ), os.getcwd(), os.path.exists("/proc/self"), os.uname()[1])
print([number for number in range(256) if os.path.exists(f"/dev/fd/{number}")], os.listdir("/tmp"))
try: import numpy
except ImportError: print("no packages")
"""
    words = ["True", "[]", "['HOME', 'LANG', 'PATH', 'PWD']", "/tmp", "False", "sandbox\n[]", "[]\nno", "packages\n"]
    assert python(sandbox, shown).output.decode() == " ".join(words)


@needs_bubblewrap
@pytest.mark.parametrize(
    ("text", "ended"),
    [
        ("while True: pass", "time"),
        ("import time\ntime.sleep(100)", "time"),
        ("import sys\nwhile True: print('x' * 1000)", "output"),
        ("import os\nfor _ in range(3): os.fork()\nheld = b'x' * (100 << 20)\nwhile True: pass", "memory"),
        ("n = 0\nwhile True:\n    n += 1\n    open(f'/tmp/{n}', 'w').close()", "disk"),
    ],
)
def test_limits_end_a_program(text, ended):
    started = time.monotonic()
    wall_s = 2.0 if ended == "time" else 4.0
    found = python(Sandbox(SandboxConfig(wall_s=wall_s, cpu_s=60, output_kib=64, memory_mib=128)), text)
    assert found.ended == ended and not found.well
    assert time.monotonic() - started < 9


@needs_bubblewrap
def test_limits_that_a_program_can_notice(sandbox):
    full = """
import os, sys, threading, time
def refused(call):
    try: call()
    except (OSError, MemoryError, RuntimeError) as error: return type(error).__name__
def fill(path):
    with open(path, "wb") as file:
        for _ in range(40): file.write(b"x" * (1 << 20))
print(refused(lambda: bytearray(1 << 30)), refused(lambda: fill("/tmp/x")),
      refused(lambda: [os.dup(0) for _ in range(100)]), refused(lambda: open("/x", "w")),
      refused(lambda: [threading.Thread(target=time.sleep, args=(9,), daemon=True).start() for _ in range(20)]))
sys.stdout.flush()
os._exit(0)
"""
    assert python(sandbox, full).output == b"MemoryError OSError OSError OSError RuntimeError\n"


@needs_bubblewrap
def test_nothing_is_left_when_the_caller_gets_its_result(sandbox):
    daemon = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(100)\nprint(os.getpid())"
    assert python(sandbox, daemon).well
    assert survivors(sandbox.config.wall_s) == []


@needs_bubblewrap
def test_a_sandbox_that_fails_later_says_so(sandbox, monkeypatch):
    monkeypatch.setattr(run, "bwrap_command", lambda *_: ["/usr/bin/false"])
    with pytest.raises(SandboxDown, match="ended with 1"):
        python(sandbox, "print(1)")
    monkeypatch.setattr(run, "bwrap_command", lambda *_: ["/no/such/program"])
    with pytest.raises(SandboxDown, match="No such file"):
        python(sandbox, "print(1)")
    monkeypatch.undo()
    assert python(sandbox, "print(1)").well, "its slot is free again"


@needs_bubblewrap
def test_in_a_user_namespace_too(monkeypatch):
    """What users other than root have; for root the kernel does not limit processes there, and the sandbox does."""
    monkeypatch.setattr(command, "real_users", lambda: False)
    sandbox = Sandbox(SandboxConfig(wall_s=20.0))
    shown = python(sandbox, "import os\nprint(os.getuid(), os.access('/', os.W_OK), os.access('/dev/shm', os.W_OK))")
    assert shown.output == b"65534 False False\n"
    sleepers = "import os, time\nfor _ in range(100): os.fork() or time.sleep(60)\ntime.sleep(60)"
    assert python(sandbox, sleepers).ended in ("processes", "itself")


@needs_bubblewrap
def test_programs_that_run_at_the_same_time_are_different_users():
    if not command.real_users():
        pytest.skip("only root can take other user numbers")
    assert len({command.user_of(slot) for slot in range(command.SLOTS)}) == command.SLOTS
    assert all(command.FIRST_USER <= int(command.user_of(slot)) < 2**31 for slot in (0, command.SLOTS - 1))


@needs_bubblewrap
@pytest.mark.skipif(not command.real_users(), reason="only the machine's own root gives programs users of their own")
def test_programs_of_two_sandboxes_are_two_users(sandbox):
    """Else the processes of one would count against the other's limit."""
    shown = "import os, time; print(os.getuid(), flush=True); time.sleep(0.5)"
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(lambda one: python(one, shown), (sandbox, Sandbox(SandboxConfig()))))
    assert all(one.well for one in found) and len({one.output for one in found}) == 2
