"""Programs that attack: none gets out, outlives its run or passes; honest programs beside them pass their tests.

The long form runs each five times and holds the speed (`-m slow`).
"""

from __future__ import annotations

import itertools
import os
import shutil
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from megatron_r1.config.reward import SandboxConfig
from megatron_r1.rewards.code import CodeTests, run_tests
from megatron_r1.rewards.sandbox.run import Sandbox
from tests.support.attacks import BY_CALLS, BY_OUTPUT, CALL_TESTS, SECRET
from tests.support.sandboxes import survivors

pytestmark = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")

LIMITS = SandboxConfig(wall_s=3.0, cpu_s=1, memory_mib=128, disk_mib=16, output_kib=256)
CLEAN_S = 2.0


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    return Sandbox(LIMITS)


@pytest.fixture
def canaries(tmp_path, monkeypatch):
    """What an attack must not reach: a file, a variable, two sockets, this process; and who called the sockets."""
    file = tmp_path / "canary-file"
    file.write_text(SECRET)
    monkeypatch.setenv("CANARY", SECRET)
    callers: list[object] = []
    with socket.create_server(("127.0.0.1", 0)) as port, socket.socket(socket.AF_UNIX) as named:
        named.bind("\0canary-socket")
        named.listen()
        for listener in (port, named):
            threading.Thread(target=_reply, args=(listener, callers), daemon=True).start()
        names = {"CANARY_FILE": str(file), "CANARY_PORT": str(port.getsockname()[1]), "CANARY_PID": str(os.getpid())}
        yield names, callers
        for listener in (port, named):
            listener.shutdown(socket.SHUT_RDWR)
    assert file.read_text() == SECRET


def _reply(listener: socket.socket, callers: list[object]) -> None:
    while True:
        try:
            line, address = listener.accept()
        except OSError:
            return
        callers.append(address)
        with line:
            line.sendall(SECRET.encode())


def attack(name: str, sandbox: Sandbox, names: dict[str, str]) -> None:
    """One attack: it is over within its limits, and has passed no test."""
    started = time.monotonic()
    if name in BY_OUTPUT:
        program = BY_OUTPUT[name]
        for key, value in names.items():
            program = program.replace(key, value)
        result = run_tests(program, CodeTests("python", inputs=("",), outputs=(SECRET,)), sandbox)
    else:
        result = run_tests(BY_CALLS[name], CodeTests("python", entry_point="solve", tests=CALL_TESTS), sandbox)
    assert result.passed == 0, name
    assert time.monotonic() - started < LIMITS.wall_s + CLEAN_S, name


def all_attacks(sandbox: Sandbox, names: dict[str, str], times: int) -> None:
    jobs = [*BY_OUTPUT, *BY_CALLS] * times
    with ThreadPoolExecutor(LIMITS.max_parallel) as threads:
        list(threads.map(lambda name: attack(name, sandbox, names), jobs))


def test_no_attack_gets_out_stays_or_passes(sandbox, canaries):
    names, callers = canaries
    all_attacks(sandbox, names, times=1)
    assert survivors(LIMITS.wall_s) == [] and callers == []
    assert sandbox.run(["/usr/bin/echo", "well"]).output == b"well\n"


@pytest.mark.parametrize("name", ["equal to everything", "an integer that equals everything"])
def test_attacks_that_work_where_program_and_tests_are_one(name):
    """In one process, as it is often done, these pass: what is refused above is more than a program that fails."""
    exec(compile(f"{BY_CALLS[name]}\n" + "\n".join(CALL_TESTS), name, "exec"), {"__name__": "one"})


def honest(sandbox: Sandbox, number: int) -> bool:
    tests = CodeTests("python", inputs=(f"{number}\n",), outputs=(f"{number * number}\n",))
    return run_tests("print(int(input()) ** 2)", tests, sandbox).passed == 1


def speed(sandbox: Sandbox, seconds: float) -> float:
    """Honest programs per second, all of which pass."""
    started, done = time.monotonic(), 0
    with ThreadPoolExecutor(sandbox.config.max_parallel) as threads:
        while (passed := time.monotonic() - started) < seconds:
            assert all(threads.map(lambda number: honest(sandbox, number), range(10)))
            done += 10
    return done / passed


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_five_times_each(sandbox, canaries):
    names, callers = canaries
    started = time.monotonic()
    all_attacks(sandbox, names, times=5)
    assert survivors(LIMITS.wall_s) == [] and callers == []
    count, seconds = len(BY_OUTPUT) + len(BY_CALLS), time.monotonic() - started
    print(f"\n{count} attacks x 5 in {seconds:.0f} s: none out, none left, none passed; load {os.getloadavg()[0]:.1f}")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_honest_programs_go_on_beside_attacks(sandbox, canaries):
    names, _ = canaries
    load = os.getloadavg()[0]
    alone = speed(sandbox, 10)
    attackers, over = Sandbox(LIMITS), threading.Event()

    def keep_attacking(first: int) -> int:
        jobs = [*BY_OUTPUT, *BY_CALLS]
        for done, name in enumerate(itertools.cycle(jobs[first:] + jobs[:first])):
            if over.is_set():
                return done
            attack(name, attackers, names)
        raise AssertionError

    with ThreadPoolExecutor(LIMITS.max_parallel) as beside:
        attacking = [beside.submit(keep_attacking, first) for first in (0, 10)]
        try:
            under = speed(sandbox, 20)
        finally:
            over.set()
        count = sum(job.result() for job in attacking)
    print(f"\nload {load:.1f}: {alone:.0f} honest programs a second, {under:.0f} beside {count} attacks")
    assert alone >= 60 and under >= 25
