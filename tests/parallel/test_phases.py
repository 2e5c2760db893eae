"""What a process does, since when, and the seconds of each phase."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest

from megatron_r1.parallel import phases
from megatron_r1.parallel.phases import Current, phase
from megatron_r1.train.hooks import Hook
from megatron_r1.train.loop import train
from megatron_r1.train.state import TrainState


class Time:
    """A clock that stands still."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def at(monkeypatch) -> Time:
    stopped = Time()
    monkeypatch.setattr(phases, "time", SimpleNamespace(monotonic=stopped.monotonic))
    phases.begin_run()
    return stopped


def test_a_moment_counts_to_the_innermost_phase(at):
    at.now += 2
    with phase("rollout"):
        at.now += 5
        with phase("rewards"):
            at.now += 7
            assert phases.current() == Current("rewards", 0, 107.0)
        assert phases.current() == Current("rollout", 0, 114.0)
        at.now += 11
    assert phases.current() == Current("start", 0, 125.0)
    assert phases.take_seconds() == {"start": 2, "rollout": 16, "rewards": 7}
    at.now += 1
    assert phases.take_seconds() == {"start": 1}


def test_an_error_leaves_its_phase(at):
    with pytest.raises(KeyError), phase("save"):
        at.now += 3
        raise KeyError
    assert phases.current() == Current("start", 0, 103.0)


def test_seconds_may_be_taken_inside_a_phase(at):
    with phase("save"):
        at.now += 3
        assert phases.take_seconds() == {"start": 0, "save": 3}
        at.now += 4
    assert phases.take_seconds() == {"save": 4, "start": 0}


def test_a_thread_beside_the_main_one_is_in_no_phase(at):
    seen = []

    def work() -> None:
        with phase("rewards"):
            at.now += 9
            seen.append(phases.current().phase)

    thread = threading.Thread(target=work)
    with phase("update"):
        thread.start()
        thread.join(10)
    assert seen == ["update"]
    assert phases.take_seconds() == {"start": 0, "update": 9}


def test_the_loop_says_which_step_is_under_way_and_when_the_steps_are_over(at, one_rank):
    seen = []

    def step(state: TrainState) -> tuple[TrainState, dict]:
        seen.append(phases.current())
        at.now += 1
        return state.advance(), {}

    class Saving(Hook):
        def finish(self, state: TrainState) -> None:
            seen.append(phases.current())

    train(TrainState(), step, Saving(), 2)
    assert [(current.phase, current.step) for current in seen] == [("step", 1), ("step", 2), ("end", 2)]
    assert phases.take_seconds() == {"start": 0, "step": 2, "end": 0}


def test_a_phase_costs_little():
    """Against what it surrounds, which takes milliseconds at least."""
    started = time.process_time()
    for _ in range(10_000):
        with phase("update"):
            pass
    assert time.process_time() - started < 1.0  # 100 microseconds each
