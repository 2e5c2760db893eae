"""The scheduler's warning: it waits until the program looks for it, and ends neither it nor what it has started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

KEEPS = """
import subprocess, sys
from megatron_r1 import stop_signal
stop_signal.block()
child = subprocess.Popen(["sleep", "60"])
print(child.pid, flush=True)
sys.stdin.readline()
print(stop_signal.received(), stop_signal.received(), child.poll(), flush=True)
child.kill()
child.wait()
"""
GIVES_UP = """
import os, signal
from megatron_r1 import stop_signal
stop_signal.block()
os.kill(os.getpid(), signal.SIGUSR1)
print("blocked", flush=True)
stop_signal.restore_default()
print("not reached")
"""

COMMAND_LINE = """
import os, signal
from megatron_r1 import __main__, stop_signal

def verb(arguments):
    os.kill(os.getpid(), signal.SIGUSR1)
    return 40 + stop_signal.received()

__main__.exit_code = verb
__main__.main()
"""


@pytest.mark.parametrize("ignored", [False, True], ids=["as it comes", "ignored at its start"])
def test_the_signal_waits_and_ends_no_child(ignored: bool) -> None:
    before = ["bash", "-c", 'trap "" USR1; exec "$@"', "ignoring"] if ignored else []
    with subprocess.Popen(
        [*before, sys.executable, "-c", KEEPS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin and process.stdout
        child = int(process.stdout.readline())
        for pid in (process.pid, child):
            os.kill(pid, signal.SIGUSR1)
        assert process.communicate("go\n", timeout=20)[0].split() == ["True", "False", "None"]


def test_a_program_that_has_no_use_for_it_ends() -> None:
    done = subprocess.run([sys.executable, "-c", GIVES_UP], capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stdout) == (-signal.SIGUSR1, "blocked\n"), done.stderr


def test_the_command_line_blocks_it_before_it_runs_a_verb() -> None:
    done = subprocess.run([sys.executable, "-c", COMMAND_LINE], capture_output=True, text=True, timeout=20)
    assert done.returncode == 41, done.stderr
