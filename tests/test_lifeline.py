"""A child dies with its parent: while it starts, hangs in native code, or another process forked from the parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_r1 import lifeline

WITHIN_S = 5.0
CHILD = """
import sys, time
from megatron_r1.lifeline import die_with_parent
{before}
die_with_parent()
print("tied", flush=True)
{after}
"""
HANGS = "3 ** (10 ** 9)  # for minutes, and it never gives back the interpreter lock"
PARENT = """
import os, subprocess, sys, threading, time
from megatron_r1 import lifeline
def start():
    children.append(subprocess.Popen([sys.executable, "-c", sys.argv[1]], env=os.environ | lifeline.variables()))
children = []
for _ in range(2):
    thread = threading.Thread(target=start)  # which is gone long before the process
    thread.start()
    thread.join()
{fork}
print(*(child.pid for child in children), flush=True)
time.sleep(600)
"""


def start(child: str, fork: str = "") -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    """A parent with two children that run this program."""
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT.format(fork=fork), child], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout
    words: list[str] = []
    while len(words) < 2:
        words += [word for word in parent.stdout.readline().split() if word.isdecimal()]
    return parent, [psutil.Process(int(word)) for word in words]


def seconds_to_die(processes: list[psutil.Process], killed: float) -> float:
    _, alive = psutil.wait_procs(processes, timeout=WITHIN_S)
    for process in alive:
        process.kill()
    assert not alive
    return time.monotonic() - killed


def kill(process: subprocess.Popen[str]) -> float:
    process.kill()
    killed = time.monotonic()
    process.wait()
    return killed


@pytest.mark.parametrize("after", ["time.sleep(600)", HANGS], ids=["asleep", "in native code"])
def test_children_die_with_a_killed_parent(after: str) -> None:
    parent, children = start(CHILD.format(before="", after=after))
    time.sleep(0.5)
    assert all(child.is_running() for child in children)  # a starting thread's end has not killed them
    assert seconds_to_die(children, kill(parent)) < WITHIN_S


def test_a_child_that_is_still_starting_dies_too() -> None:
    parent, children = start(CHILD.format(before="time.sleep(1)", after="time.sleep(600)"))
    assert seconds_to_die(children, kill(parent)) < WITHIN_S


def test_a_fork_of_the_parent_does_not_keep_children_alive(tmp_path: Path) -> None:
    fork = f"""
if (pid := os.fork()) == 0:
    time.sleep(600)
open({str(tmp_path / "pid")!r}, "w").write(str(pid))"""
    parent, children = start(CHILD.format(before="", after="time.sleep(600)"), fork)
    time.sleep(0.5)
    forked = psutil.Process(int((tmp_path / "pid").read_text()))
    try:
        assert seconds_to_die(children, kill(parent)) < WITHIN_S
        assert forked.is_running()
    finally:
        forked.kill()


def test_a_child_outlives_its_siblings(tmp_path: Path) -> None:
    parent, (first, second) = start(CHILD.format(before="", after="time.sleep(600)"))
    time.sleep(0.5)
    first.kill()
    time.sleep(0.2)
    assert second.status() != psutil.STATUS_ZOMBIE
    assert seconds_to_die([second], kill(parent)) < WITHIN_S


def test_grandchildren_are_not_tied_by_the_same_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(lifeline.VARIABLE, lifeline.lifeline())
    reached: list[str] = []
    monkeypatch.setattr(lifeline, "tie_to", reached.append)
    lifeline.die_with_parent()
    assert reached == [lifeline.lifeline()] and lifeline.VARIABLE not in os.environ


def test_ranks_of_torchrun_die_with_it(tmp_path: Path) -> None:
    program = tmp_path / "rank.py"
    program.write_text(
        f"import os, pathlib\nfrom megatron_r1.lifeline import die_with_parent\ndie_with_parent()\n"
        f"pathlib.Path({str(tmp_path)!r}, 'rank' + os.environ['RANK']).write_text(str(os.getpid()))\n{HANGS}"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(program)]
    launcher = subprocess.Popen(command, text=True)
    files = [tmp_path / "rank0", tmp_path / "rank1"]
    while launcher.poll() is None and not all(file.exists() and file.read_text() for file in files):
        time.sleep(0.05)
    ranks = [psutil.Process(int(file.read_text())) for file in files]
    launcher.send_signal(signal.SIGKILL)
    killed = time.monotonic()
    launcher.wait()
    assert seconds_to_die(ranks, killed) < WITHIN_S
