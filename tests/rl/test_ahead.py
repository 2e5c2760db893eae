"""Rollouts one step ahead: the same prompts in the same order, sampled while the trainer learns."""

from __future__ import annotations

import threading

import pytest

from megatron_r1.config.layout import check_layout
from megatron_r1.config.load import load
from megatron_r1.errors import ConfigError, NoRolloutCapacity
from megatron_r1.rl.ahead import AheadRollouts
from megatron_r1.rl.loop import staleness
from megatron_r1.rl.rollouts import Rollout
from megatron_r1.rollout.sample import Sample

LAST = 4


class Source:
    """Samples when it is allowed to, with whatever weights there are; takes more prompts every step."""

    def __init__(self) -> None:
        self.version, self.asked = "0", []
        self.may = threading.Event()
        self.may.set()
        self.fails_at = 0

    def take(self, step: int, first_prompt: int) -> Rollout:
        self.asked.append((step, first_prompt))
        assert self.may.wait(timeout=20)
        if step == self.fails_at:
            raise NoRolloutCapacity("nobody is there")
        sample = Sample(str(first_prompt), 0, (1,), (2,), (-1.0,), self.version, "stop", "", 0.0, {})
        return Rollout([sample], 10 + step, {})


@pytest.fixture
def source() -> Source:
    return Source()


def train(rollouts, source: Source) -> list[tuple[str, str, int]]:
    """Prompt and weight version of each step's sample, and how stale it was."""
    seen, position = [], 0
    for step in range(1, LAST + 1):
        rollout = rollouts.take(step, position)
        (sample,) = rollout.samples
        seen.append((sample.prompt_id, sample.weight_version, staleness(rollout.samples, step - 1)))
        position += rollout.prompts
        if getattr(rollouts, "_next", None):
            rollouts._next[2].result(timeout=20)  # as weights wait for the engine to be done
        source.version = str(step)
    return seen


def test_every_step_gets_the_prompts_that_it_would_get_in_turns(source):
    in_turns = train(source, source)
    assert [stale for *_, stale in in_turns] == [0, 0, 0, 0]
    asked, other = list(source.asked), Source()
    with AheadRollouts(other, LAST) as ahead:
        seen = train(ahead, other)
    assert [prompt for prompt, *_ in seen] == [prompt for prompt, *_ in in_turns] and other.asked == asked
    assert [(version, stale) for _, version, stale in seen] == [("0", 0), ("0", 1), ("1", 1), ("2", 1)]


def test_the_next_rollout_is_sampled_meanwhile(source):
    with AheadRollouts(source, LAST) as ahead:
        first = ahead.take(1, 0)
        source.may.clear()
        assert source.asked[0] == (1, 0) and len(first.samples) == 1  # given, while the next one waits
        source.may.set()
        ahead.take(2, first.prompts)
    assert source.asked[:2] == [(1, 0), (2, 11)]


def test_a_failure_shows_at_the_step_that_it_is_of(source):
    source.fails_at = 2
    with AheadRollouts(source, LAST) as ahead:
        rollout = ahead.take(1, 0)
        with pytest.raises(NoRolloutCapacity, match="nobody is there"):
            ahead.take(2, rollout.prompts)


def test_what_was_begun_for_other_prompts_is_not_taken(source):
    with AheadRollouts(source, LAST) as ahead:
        ahead.take(1, 0)
        assert ahead.take(2, 500).samples[0].prompt_id == "500"


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        (["rollout=local", "rollout.ahead=1"], "rollout.ahead=1"),
        (["rollout.ahead=1", "rl.old_log_probs=trainer"], "old_log_probs"),
    ],
)
def test_what_cannot_be_ahead_is_refused(changes, key):
    with pytest.raises(ConfigError, match=key):
        check_layout(load("grpo", [*changes, "init.from=runs/base"]), "grpo", 1)
