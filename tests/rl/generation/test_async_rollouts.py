"""Rollouts ahead of the trainer: the same prompts in the same order, never staler than allowed, nothing left behind."""

from __future__ import annotations

import threading
import time

import pytest

from megatron_r1.config.cross_checks import check_layout
from megatron_r1.config.load import load
from megatron_r1.errors import ConfigError, NoRolloutCapacity
from megatron_r1.rl.generation.async_rollouts import AsyncRollouts
from megatron_r1.rl.generation.rollouts import Rollout
from megatron_r1.rl.loop import staleness, tokens_by_version
from megatron_r1.rollout.sample import Sample
from tests.support.samples import make_sample

LAST, PROMPTS = 8, 10


class Source:
    """Samples when it is allowed to, with whatever weights there are."""

    def __init__(self) -> None:
        self.version, self.prompts = "0", []
        self.may, self.abandoned = threading.Event(), threading.Event()
        self.may.set()
        self.fails_at, self.busy_seconds = 0, 0.0

    def take(self, step: int, first_prompt: int) -> Rollout:
        version = self.version
        self.prompts.append((step, first_prompt))
        while not self.may.wait(timeout=0.02):
            if self.abandoned.is_set():
                raise NoRolloutCapacity("abandoned")
        if step == self.fails_at:
            raise NoRolloutCapacity("nobody is there")
        return Rollout([sample(str(first_prompt), version)], {})


def sample(prompt: str, version: str, *later: tuple[int, str]) -> Sample:
    return make_sample(prompt_id=prompt, response_tokens=(2,) * 4, weight_version=version, version_changes=later)


@pytest.fixture
def source() -> Source:
    return Source()


def ahead_of(source: Source, ahead: int) -> AsyncRollouts:
    return AsyncRollouts(source, ahead, PROMPTS, LAST, source.abandoned.set)


def train(rollouts, source: Source) -> list[tuple[str, int]]:
    """Prompt of each step's sample, and how stale it was."""
    trained = []
    for step in range(1, LAST + 1):
        source.version = str(step - 1)
        rollout = rollouts.take(step, (step - 1) * PROMPTS)
        trained.append((rollout.samples[0].prompt_id, staleness(rollout.samples, step - 1)["rollout/staleness_max"]))
        time.sleep(0.01)  # the others are begun meanwhile
    return trained


@pytest.mark.parametrize("ahead", [1, 2, 5])
def test_steps_get_their_prompts_and_no_sample_is_staler_than_allowed(source, ahead):
    in_turns = train(source, source)
    assert in_turns == [(str(PROMPTS * step), 0) for step in range(LAST)]
    other = Source()
    with ahead_of(other, ahead) as rollouts:
        trained = train(rollouts, other)
    assert [prompt for prompt, _ in trained] == [prompt for prompt, _ in in_turns]
    assert sorted(other.prompts) == source.prompts
    assert all(stale <= min(step, ahead) for step, (_, stale) in enumerate(trained)) and any(
        stale for _, stale in trained
    )


def test_later_rollouts_are_sampled_meanwhile_and_no_more_than_allowed(source):
    with ahead_of(source, 2) as rollouts:
        rollouts.take(1, 0)
        source.may.clear()
        time.sleep(0.1)
        assert sorted(source.prompts) == [(1, 0), (2, 10), (3, 20)]
        source.may.set()
        rollouts.take(2, 10)
        time.sleep(0.1)
    assert sorted(source.prompts)[3:] == [(4, 30)]


def test_a_failure_shows_at_the_step_that_it_is_of(source):
    source.fails_at = 2
    with ahead_of(source, 2) as rollouts:
        rollouts.take(1, 0)
        with pytest.raises(NoRolloutCapacity, match="nobody is there"):
            rollouts.take(2, 10)


def test_a_rollout_started_for_other_prompts_is_not_used(source):
    with ahead_of(source, 1) as rollouts:
        rollouts.take(1, 0)
        assert rollouts.take(2, 500).samples[0].prompt_id == "500"


def test_the_end_does_not_wait_for_started_rollouts(source):
    began = time.monotonic()
    with ahead_of(source, 3) as rollouts:
        rollouts.take(1, 0)
        source.may.clear()
        source.abandoned.clear()
        time.sleep(0.1)
    assert time.monotonic() - began < 2 and source.abandoned.is_set()


def test_staleness_counts_tokens():
    samples = [sample("a", "3", (1, "4"), (3, "6")), sample("b", "6")]
    assert tokens_by_version(samples[0]) == [("3", 1), ("4", 2), ("6", 1)]
    assert tokens_by_version(samples[1]) == [("6", 4)]
    metrics = staleness(samples, 6)
    assert metrics == {
        "rollout/staleness_max": 3,
        "rollout/staleness_mean": (3 + 2 * 2) / 8,
        "rollout/multi_version": 0.5,
    }


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        (["rollout=local", "rollout.max_staleness=1"], "rollout.max_staleness=1"),
        (["rollout.max_staleness=1", "rl.old_logprobs_from=trainer"], "old_logprobs_from"),
        (["rollout.max_staleness=2", "rollout.weight_sync.pause_mode=abort"], "rollout.weight_sync.pause_mode=abort"),
        (["rollout.max_staleness=1", "rl=on_policy"], "rl.objective=on_policy"),
        (
            ["rollout.max_staleness=2", "rollout.weight_sync.pause_mode=retract", "rl.routing_replay=true",
             "rollout.sglang.server.return_routed_experts=true"],
            "rollout.weight_sync.pause_mode=retract",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_ahead_is_refused(changes, key):
    with pytest.raises(ConfigError, match=key):
        check_layout(load("grpo", [*changes, "init.from=runs/base"]), "grpo", 1)
