"""Who has the memory when: the order in which trainer and engine give and take it, also when a step cannot begin."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megatron_r1.errors import NoRolloutCapacity
from megatron_r1.rl.generation.rollouts import Rollout
from megatron_r1.rl.loop import reinforcement_step
from megatron_r1.rl.placement import Colocated
from megatron_r1.train.loop import StepUnavailable
from megatron_r1.train.offload import Offloaded
from megatron_r1.train.state import TrainState
from tests.support.samples import make_sample

SAMPLES = [make_sample(reward=1.0)]


class Watching:
    """An engine and a learner that note what the trainer holds when they are called: W weights, O optimizer state."""

    def __init__(self, missing: bool = False, fails: str = ""):
        self.weights, self.moments = torch.ones(3), torch.ones(5)
        weights = Offloaded(torch.device("cpu"), lambda: [self.weights])
        rest = Offloaded(torch.device("cpu"), lambda: [self.moments])
        self.placement = Colocated(SimpleNamespace(weights=weights, rest=rest))  # type: ignore[arg-type]
        self.has_dead_server, self.fails = missing, fails
        self.notes: list[str] = []
        self.placement.attach(self)
        self.fails = fails
        self.notes.clear()
        self.busy_seconds = 0.0

    @property
    def held(self) -> str:
        return "".join(
            letter
            for letter, tensor in (("W", self.weights), ("O", self.moments))
            if tensor.untyped_storage().nbytes() and bool((tensor == 1).all())
        )

    def note(self, what: str) -> None:
        self.notes.append(f"{what} {self.held}".strip())
        if what == self.fails:
            raise NoRolloutCapacity(what)

    def release_memory(self) -> None:
        self.note("give back")

    def resume_memory(self, tags) -> None:
        self.note(f"take {tags[0]}")

    def restart_dead(self) -> None:
        self.note("start")
        self.has_dead_server = False

    def take(self, step: int, first_prompt: int) -> Rollout:
        self.note("sample")
        return Rollout(SAMPLES, {})

    def learn(self, samples, state: TrainState) -> tuple[TrainState, dict]:
        self.note("learn")
        return state.advance(updates=1), {}

    def step(self) -> list[str]:
        step = reinforcement_step(self, self, lambda version: self.note("send"), 1, self.placement)  # type: ignore[arg-type]
        step(TrainState())
        return self.notes


TURN = ["take weights W", "send W", "take kv_cache", "sample", "give back", "learn WO"]


def test_each_has_the_memory_in_its_turn(one_rank):
    assert Watching().step() == TURN


def test_a_server_that_has_ended_starts_while_the_trainer_holds_nothing(one_rank):
    assert Watching(missing=True).step() == ["start", *TURN]


@pytest.mark.parametrize(
    ("fails", "notes"),
    [("send", [*TURN[:2], "send W", "give back W"]), ("sample", TURN[:5])],
)
def test_the_trainer_can_save_what_it_has_learnt_when_there_is_no_engine(one_rank, fails, notes):
    watching = Watching(fails=fails)
    with pytest.raises(StepUnavailable, match=fails):
        watching.step()
    assert watching.notes == notes and watching.held == "WO"


def test_servers_start_while_the_trainer_holds_nothing(one_rank):
    watching = Watching()
    with watching.placement.starting_servers():
        watching.note("start")
        watching.placement.attach(watching)
    assert watching.notes == ["start", "give back"] and watching.held == "WO"
