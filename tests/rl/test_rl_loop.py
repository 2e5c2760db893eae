"""The order of a step, and what a run does that has no engine any more: save, and end."""

from __future__ import annotations

import pytest

from megatron_r1.errors import NoRolloutCapacity
from megatron_r1.parallel import phases
from megatron_r1.rl.generation.rollouts import Rollout
from megatron_r1.rl.loop import reinforcement_step, text_metrics
from megatron_r1.train.hooks import Hook
from megatron_r1.train.loop import train
from megatron_r1.train.state import TrainState
from tests.support.samples import make_sample

SAMPLES = [make_sample(reward=1.0, reward_parts={"accuracy": 1.0})]


class Run(Hook):
    """A run that takes notes of its order, and fails where it is told to."""

    def __init__(self, fails: tuple[str, ...] = ()):
        self.notes: list[str] = []
        self.fails = list(fails)
        self.busy_seconds = 0.0

    def note(self, what: str) -> None:
        self.notes.append(what)
        if what in self.fails:
            self.fails.remove(what)
            raise NoRolloutCapacity(what)

    def publish(self, version: str) -> None:
        self.note(f"send {version}")

    def take(self, step: int, first_prompt: int) -> Rollout:
        self.note(f"take {step} from {first_prompt}")
        return Rollout(SAMPLES, {"rollout/lost_groups": 0})

    def learn(self, samples, state: TrainState) -> tuple[TrainState, dict]:
        self.note("learn")
        return state.advance(updates=state.updates + 1), {}

    def after_step(self, state: TrainState, row: dict) -> None:
        assert row["rollout/lost_groups"] == 0
        self.note(f"row {state.step}")

    def finish(self, state: TrainState) -> None:
        self.note(f"save {state.step} at {state.data_position}")

    def go(self) -> TrainState:
        return train(TrainState(), reinforcement_step(self, self, self.publish, prompts_per_rollout=7), self, 2)


def test_weights_are_sent_before_each_rollout_and_prompts_are_counted(one_rank):
    run = Run()
    assert run.go().data_position == 14
    first = ["send 0", "take 1 from 0", "learn", "row 1"]
    assert run.notes == [*first, "send 1", "take 2 from 7", "learn", "row 2", "save 2 at 14"]


@pytest.mark.parametrize("fails", [("send 1", "send 1"), ("take 2 from 7",)])
def test_without_an_engine_what_was_learnt_is_saved(one_rank, fails):
    run = Run(fails)
    with pytest.raises(NoRolloutCapacity, match=fails[0]):
        run.go()
    assert run.notes[-1] == "save 1 at 7" and run.notes.count("learn") == 1


def test_weights_and_rollout_are_phases_of_their_own(one_rank):
    class Phases(Run):
        def note(self, what: str) -> None:
            self.notes.append(f"{phases.current().phase} {phases.current().step}")

    run = Phases()
    run.go()
    first = ["weight_sync 1", "rollout 1", "step 1", "step 1"]
    assert run.notes == [*first, *(note.replace("1", "2") for note in first), "end 2"]


def test_each_step_records_what_the_engine_counted_since_the_last(one_rank):
    totals = iter([{"sent": 5, "answered": 4, "failed": 1, "resent": 0, "restarts": 0}, {"sent": 9, "answered": 8,
                   "failed": 1, "resent": 2, "restarts": 1}])  # fmt: skip
    run = Run()
    step = reinforcement_step(run, run, run.publish, prompts_per_rollout=7, health=lambda: next(totals))
    names = ("requests_sent", "requests_failed", "requests_resent", "server_restarts")
    state, first = step(TrainState())
    _, second = step(state)
    assert [first[f"rollout/{name}"] for name in names] == [5, 1, 0, 0]
    assert [second[f"rollout/{name}"] for name in names] == [4, 0, 2, 1]


def test_each_rollout_is_shown_with_its_step(one_rank):
    run, shown = Run(), []
    step = reinforcement_step(run, run, run.publish, 7, show=lambda step, samples: shown.append((step, len(samples))))
    step(step(TrainState())[0])
    assert shown == [(1, len(SAMPLES)), (2, len(SAMPLES))]


def test_weights_that_did_not_arrive_are_sent_once_more(one_rank):
    run = Run(("send 1",))
    assert run.go().step == 2
    assert run.notes.count("send 1") == 2


def test_what_fails_in_the_middle_of_learning_saves_nothing(one_rank):
    run = Run(("learn",))
    with pytest.raises(NoRolloutCapacity, match="learn"):
        run.go()
    assert not [note for note in run.notes if note.startswith("save")]


def test_how_responses_are_written_is_recorded():
    texts = ["Wait, but that is wrong.", "so it is \u4e8c\u5341", "plain", "\u4e8c\u5341"]
    assert text_metrics(texts) == {"rollout/mixed_language": 0.25, "rollout/reflection_words": 0.75}
