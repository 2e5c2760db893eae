"""When a run goes back before a spike, what it then skips, and which checkpoints no longer count."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_r1.config.watch import WatchConfig
from megatron_r1.errors import ConfigError, DataError, Requeue
from megatron_r1.train.hooks.rewind import RewindHook
from megatron_r1.train.rewinds import (
    Rewind,
    is_undone,
    next_position,
    read_rewinds,
    record_rewind,
    skipped_sequences,
    skipping,
)
from megatron_r1.train.state import TrainState

WATCH = WatchConfig(max_rewinds=1, rewind_after_spikes=2)
SIZE, STEPS = 4, 100
"""Sequences of a step, and steps of the run."""


def rewind(skip_from: int, skip_to: int, first_step: int = 1) -> Rewind:
    steps = {"first_step": first_step, "spike_step": first_step, "last_step": first_step + 1}
    return Rewind(**steps, skip_from=skip_from, skip_to=skip_to)


class Attempt:
    """Steps of a run with spikes at some of them."""

    def __init__(self, watch: WatchConfig = WATCH, rewinds: tuple[Rewind, ...] = (), saved: tuple[int, ...] = (4,)):
        self.rows: list[dict[str, Any]] = []
        self.recorded: list[Rewind] = []
        self._watch, self._rewinds, self._saved = watch, rewinds, saved
        self.hook = self.started(TrainState())

    def started(self, state: TrainState) -> RewindHook:
        saved, record = lambda: self._saved, self.recorded.append
        self.state = state
        self.hook = RewindHook(self._watch, STEPS, self._rewinds, state, self.rows, saved, record)
        return self.hook

    def steps(self, *spikes: int) -> bool:
        """Make a step for each number, which is that of its spikes; returns whether the attempt is to end."""
        for number in spikes:
            self.state = self.state.advance(data_position=self.state.data_position + SIZE)
            row: dict[str, Any] = {"step": self.state.step, "train/spikes": number, "train/loss": 1.0 + number}
            self.hook.after_step(self.state, row)
            self.rows.append(row)
        return self.hook.stop_requested()


def test_consecutive_spikes_undo_their_steps(one_rank: Any) -> None:
    attempt = Attempt()
    assert not attempt.steps(0, 0, 0, 0, 0, 1, 0, 2) and attempt.steps(1)
    with pytest.raises(Requeue, match="the spike from step 8 to 9 is confirmed: .* before step 8 and skips 8 seq"):
        attempt.hook.finish(attempt.state)
    (found,) = attempt.recorded
    assert (found.first_step, found.spike_step, found.last_step, found.skip_from, found.skip_to) == (8, 8, 9, 28, 36)
    assert found.values == {"train/loss": 2.0}
    assert [row["train/data_position"] for row in attempt.rows] == [SIZE * step for step in range(1, 10)]


def test_a_margin_undoes_the_steps_before_too(one_rank: Any) -> None:
    attempt = Attempt(replace(WATCH, rewind_margin_steps=2))
    attempt.steps(0, 0, 0, 0, 0, 0, 0, 1, 1)
    with pytest.raises(Requeue):
        attempt.hook.finish(attempt.state)
    assert (attempt.recorded[0].first_step, attempt.recorded[0].skip_from) == (6, 20)


@pytest.mark.parametrize("stopped_after", [7, 8])
def test_a_resumed_attempt_decides_as_if_it_had_not_stopped(stopped_after: int, one_rank: Any) -> None:
    spikes, attempt = [0, 0, 0, 0, 0, 0, 0, 1, 1], Attempt()
    attempt.steps(*spikes[:stopped_after])
    attempt.started(attempt.state)
    assert attempt.steps(*spikes[stopped_after:])
    with pytest.raises(Requeue):
        attempt.hook.finish(attempt.state)
    assert (attempt.recorded[0].spike_step, attempt.recorded[0].skip_from, attempt.recorded[0].skip_to) == (8, 28, 36)


def test_rows_without_positions_leave_those_since_the_resume(one_rank: Any) -> None:
    attempt = Attempt()
    attempt.rows = [{"step": step, "train/spikes": int(step == 8)} for step in range(1, 9)]
    attempt.started(TrainState(step=8, data_position=32))
    assert attempt.steps(1)
    with pytest.raises(Requeue):
        attempt.hook.finish(attempt.state)
    assert (attempt.recorded[0].first_step, attempt.recorded[0].skip_from) == (8, 32)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rewinds": (rewind(0, 4),)}, "it already did so watch.max_rewinds=1 times"),
        ({"saved": (8,)}, "it has no checkpoint before step 8"),
    ],
)
def test_a_run_that_cannot_go_back_says_why_once(changes: dict[str, Any], reason: str, caplog: Any) -> None:
    attempt = Attempt(**changes)
    assert not attempt.steps(0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1)
    (message,) = caplog.messages
    assert message == f"step 9: the spike is confirmed, but the run does not go back: {reason}"


def test_the_last_step_undoes_nothing(one_rank: Any) -> None:
    attempt = Attempt()
    attempt.started(TrainState(step=STEPS - 2))
    assert not attempt.steps(1, 1)
    attempt.hook.finish(attempt.state)
    assert attempt.recorded == []


def test_a_step_reads_behind_what_is_skipped(tmp_path: Path) -> None:
    rewinds = [rewind(20, 28), rewind(28, 36), rewind(24, 32)]
    assert [next_position(position, rewinds) for position in (0, 19, 20, 27, 31, 36)] == [0, 19, 36, 36, 36, 36]
    assert skipped_sequences(rewinds) == 16
    step = skipping(lambda state: (state, {}), rewinds)
    assert step(TrainState(data_position=20))[0].data_position == 36
    for one in rewinds:
        record_rewind(tmp_path, one)
    assert read_rewinds(tmp_path) == rewinds
    (tmp_path / "rewinds" / "0002.json").write_text("{}")
    with pytest.raises(DataError, match=r"rewinds/0002\.json: is no record of a rewind"):
        read_rewinds(tmp_path)


def test_checkpoints_of_undone_steps_do_not_count() -> None:
    rewinds = [rewind(0, 8, first_step=40), rewind(8, 16, first_step=30)]
    undone = {
        (step, count): is_undone({"step": step} | ({"rewinds": count} if count else {}), rewinds)
        for step in (29, 30, 40)
        for count in (0, 1, 2)
    }
    assert {found for found, is_so in undone.items() if is_so} == {(30, 0), (30, 1), (40, 0), (40, 1)}


def test_going_back_needs_spikes() -> None:
    with pytest.raises(ConfigError, match="max_rewinds=2: needs spike_sigmas above 0"):
        WatchConfig(max_rewinds=2, spike_sigmas=0)
