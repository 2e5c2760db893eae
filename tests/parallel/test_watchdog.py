"""Deadlines of one rank: what counts, what does not, and what is left of a rank that hangs."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from dataclasses import fields
from pathlib import Path

import pytest

from megatron_r1.config.watch import WatchConfig
from megatron_r1.errors import ConfigError, ExitCode
from megatron_r1.parallel import phases
from megatron_r1.parallel.watchdog import KEYS, Watchdog, heartbeat_interval

NONE = {field.name: 0.0 for field in fields(WatchConfig) if field.name.endswith("_deadline_s")}


class Stepped(Watchdog):
    """A watchdog that looks when the test says so, at a time that the test sets."""

    def __init__(self, folder: Path, **deadlines: float):
        super().__init__(WatchConfig(**NONE | deadlines), folder, 0, end=lambda _: None)
        self._stopped.set()
        self._thread.join(10)

    def look_after(self, monkeypatch: pytest.MonkeyPatch, seconds: float) -> str:
        now = time.monotonic() + seconds
        monkeypatch.setattr(time, "monotonic", lambda: now)
        verdict = self.verdict()
        return verdict.text if verdict else ""


def test_every_phase_has_a_deadline():
    assert set(KEYS) == set(phases.PHASES)
    assert {f"{key}_deadline_s" for key in KEYS.values()} | {"heartbeat_deadline_s"} == set(NONE)


def test_a_phase_that_takes_too_long_is_named(tmp_path, monkeypatch):
    watchdog = Stepped(tmp_path, save_deadline_s=100.0)  # it looks every 7.5 s
    phases.begin_run()
    phases.begin_step(7)
    with phases.phase("save"):
        assert [watchdog.look_after(monkeypatch, 10.0) for _ in range(11)] == [""] * 11
        text = watchdog.look_after(monkeypatch, 10.0)
    assert text.endswith(" has been in phase save of step 7 for 110 s (watch.save_deadline_s=100)")
    assert text.startswith("rank 0 on ")


def test_a_phase_begins_its_deadline_anew_and_others_do_not_count(tmp_path, monkeypatch):
    watchdog = Stepped(tmp_path, step_deadline_s=100.0)
    phases.begin_run()
    for step in (1, 2, 3):
        phases.begin_step(step)
        for _ in range(9):
            assert not watchdog.look_after(monkeypatch, 10.0)
    with phases.phase("rollout"):  # without a deadline here
        assert not any(watchdog.look_after(monkeypatch, 10.0) for _ in range(50))


def test_time_in_which_the_process_was_stopped_does_not_count(tmp_path, monkeypatch):
    watchdog = Stepped(tmp_path, step_deadline_s=100.0)
    phases.begin_run()
    phases.begin_step(1)
    assert not any(watchdog.look_after(monkeypatch, seconds) for seconds in (10.0, 10.0, 4000.0, 10.0))


def test_a_heartbeat_comes_four_times_in_the_shortest_deadline():
    assert heartbeat_interval(WatchConfig()) == 15.0
    assert heartbeat_interval(WatchConfig(**NONE | {"step_deadline_s": 8.0, "save_deadline_s": 20.0})) == 2.0


@pytest.mark.parametrize("value", [-1.0, 0.5])
def test_odd_deadlines_are_refused(value):
    with pytest.raises(ConfigError, match="save_deadline_s="):
        WatchConfig(save_deadline_s=value)


HANGS = """
import sys, threading
from pathlib import Path
from megatron_r1.config.watch import WatchConfig
from megatron_r1.parallel import phases
from megatron_r1.parallel.watchdog import watchdog

def stuck():
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()

phases.begin_step(4)
with watchdog(WatchConfig(evaluation_deadline_s=1.0), Path(sys.argv[1]), 0), phases.phase("evaluation"):
    stuck()
"""


def test_a_process_that_hangs_ends_with_its_stacks(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", HANGS, str(tmp_path / "logs")], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == ExitCode.STALLED, done.stderr
    assert "in phase evaluation of step 4 for " in done.stderr and "watch.evaluation_deadline_s=1" in done.stderr
    (stacks,) = (tmp_path / "logs").iterdir()
    assert stacks.name == "stacks-rank-00000.txt" and "in stuck" in stacks.read_text()
    assert str(stacks) in done.stderr


def test_a_run_that_does_not_hang_leaves_no_stacks(tmp_path):
    from megatron_r1.parallel.watchdog import watchdog

    before = threading.active_count()
    with watchdog(WatchConfig(), tmp_path / "logs", 0):
        pass
    assert not [*(tmp_path / "logs").iterdir()] and threading.active_count() == before
