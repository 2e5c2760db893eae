"""Hooks act in order, and finish in reverse order, each of them also after another's error."""

from __future__ import annotations

import pytest

from megatron_r1.train.hooks import Hook, Hooks
from megatron_r1.train.state import TrainState


class Noting(Hook):
    def __init__(self, name: str, notes: list[str], fails: bool = False):
        self._name, self._notes, self._fails = name, notes, fails

    def after_step(self, state: TrainState, row: dict[str, object]) -> None:
        self._notes.append(f"step {self._name}")

    def finish(self, state: TrainState) -> None:
        self._notes.append(f"finish {self._name}")
        if self._fails:
            raise OSError("the disk is full")


def test_a_run_is_saved_before_its_log_ends() -> None:
    notes: list[str] = []
    hooks = Hooks([Noting("log", notes), Noting("checkpoint", notes)])
    hooks.after_step(TrainState(), {})
    hooks.finish(TrainState())
    assert notes == ["step log", "step checkpoint", "finish checkpoint", "finish log"]


def test_a_save_that_fails_does_not_leave_the_log_open() -> None:
    notes: list[str] = []
    with pytest.raises(OSError, match="the disk is full"):
        Hooks([Noting("log", notes), Noting("checkpoint", notes, fails=True)]).finish(TrainState())
    assert notes == ["finish checkpoint", "finish log"]
