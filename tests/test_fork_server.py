"""A program that is forked ends as in an interpreter of its own, and is ended when it takes too long."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.support.fork_server import fork_server, run_forked

PROGRAM = """
import atexit, os, signal, sys, threading
atexit.register(print, "at its end")
threading.Timer(0.1, print, ["a thread's last word"]).start()
print(__name__, sys.argv, os.getcwd(), os.environ["MEGATRON_R1_TEST"], sys.stdin.read())
print("an error", file=sys.stderr)
{ending}
"""
ENDINGS = {
    "end": "",
    "code": "sys.exit(7)",
    "message": "sys.exit('why it ends')",
    "error": "raise ValueError('of this test')",
    "at once": "os._exit(3)",
    "signal": "os.kill(os.getpid(), signal.SIGKILL)",
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_program_ends_as_in_an_interpreter_of_its_own(
    ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(ending=ENDINGS[ending]))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MEGATRON_R1_TEST", ending)
    command = [sys.executable, "-W", "ignore", program, "two words"]
    fresh = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
    forked = run_forked(program, "two words")
    assert (forked.returncode, forked.stdout) == (fresh.returncode, fresh.stdout)
    assert forked.stderr.splitlines()[-1:] == fresh.stderr.splitlines()[-1:]


def test_a_program_that_takes_too_long_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import subprocess, time\nprint(subprocess.Popen(['sleep', '300']).pid, flush=True)\ntime.sleep(300)\n"
    )
    assert run_forked("platform", seconds=60).returncode == 0, "the process to fork from is there"
    with pytest.raises(subprocess.TimeoutExpired) as ended:
        run_forked(program, seconds=3)
    started = int(ended.value.stdout)
    deadline = time.monotonic() + 30
    while psutil.pid_exists(started) and psutil.Process(started).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert run_forked("platform", seconds=60).returncode == 0, "and is there again"


def test_a_program_is_watched_while_it_runs(tmp_path: Path) -> None:
    program, log = tmp_path / "program.py", tmp_path / "log"
    program.write_text(
        "import os, subprocess, sys\nsleeper = subprocess.Popen(['sleep', '300'])\n"
        "print(os.environ['OF_THIS'], sys.stdin.read(), file=sys.stderr, flush=True)\nsleeper.wait()\nsys.exit(5)\n"
    )
    log.write_text("of the launch before\n")
    running = fork_server().start([str(program)], (log, log), {"OF_THIS": "program"})
    try:
        deadline = time.monotonic() + 60
        while "program" not in log.read_text():
            assert time.monotonic() < deadline and running.poll() is None
            time.sleep(0.05)
        assert log.read_text() == "of the launch before\nprogram \n"
        parent, child = sorted(running.processes(), key=lambda process: process.pid != running.pid)
        assert (parent.pid, child.ppid()) == (running.pid, running.pid)
        with pytest.raises(subprocess.TimeoutExpired):
            running.wait(0.1)
        child.kill()
        assert running.wait(60) == 5 == running.poll() and not running.processes()
    finally:
        running.end()
