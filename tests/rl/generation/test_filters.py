"""Responses that train the policy: each filter alone, and rollouts that are refilled, short, lost, and resumed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_r1.config.rl import FilterConfig
from megatron_r1.config.run import RunConfig
from megatron_r1.data.chat.prompt_format import PromptFormatter
from megatron_r1.data.prompts.prompts import TrainingPrompts
from megatron_r1.data.synthetic.train_tokenizer import train_tokenizer
from megatron_r1.errors import NoRolloutCapacity
from megatron_r1.rewards.reward import Unscored
from megatron_r1.rewards.score import Score
from megatron_r1.rl.advantages.group_relative import group_advantages, ragged_group_advantages
from megatron_r1.rl.generation.filters import (
    apply_filters,
    build_filters,
    drop_duplicates,
    drop_truncated,
    drop_zero_std,
    mask_truncated,
)
from megatron_r1.rl.generation.rollouts import REFILLS, Rollouts
from megatron_r1.rl.policy.batch import make_batch
from megatron_r1.rollout.engine import Completion, FailedRequest, Outcome, Request, Sampling
from megatron_r1.rollout.journal import Journal
from megatron_r1.rollout.sample import Sample
from tests.support.samples import make_response, make_sample


def sample(tokens: Sequence[int], reward: float, reason: str = "stop") -> Sample:
    parts = {"accuracy": reward}
    return make_sample(response_tokens=tuple(tokens), finish_reason=reason, reward=reward, reward_parts=parts)


RIGHT, WRONG, AGAIN = sample([5, 9], 1.0), sample([6, 9], 0.0), sample([5, 9], 1.0)
CUT, CUT_RIGHT = sample([7, 7, 7], 0.0, "length"), sample([8, 8, 8], 1.0, "length")


def test_each_filter_removes_its_own():
    group = [RIGHT, WRONG, AGAIN, CUT]
    assert drop_duplicates(group) == [RIGHT, WRONG, CUT]
    assert drop_truncated(group) == [RIGHT, WRONG, AGAIN]
    assert mask_truncated(group) == [RIGHT, WRONG, AGAIN, replace(CUT, in_loss=False)]
    assert drop_zero_std(group) == group
    assert drop_zero_std([RIGHT, AGAIN]) == [] == drop_zero_std([WRONG, CUT])
    # Rewards of steps are compared too, within one response and with the rewards of responses.
    with_steps = [replace(one, steps=((0, 1.0),)) for one in (RIGHT, AGAIN)]
    assert drop_zero_std(with_steps) == [] and drop_zero_std(
        [replace(with_steps[0], steps=((0, 1.0), (1, 0.0))), with_steps[1]]
    )


def test_nothing_is_configured_by_default():
    assert build_filters(FilterConfig()) == {}
    assert apply_filters([RIGHT, RIGHT], {}) == ([RIGHT, RIGHT], {})


@pytest.mark.parametrize(
    ("settings", "group", "left", "counts"),
    [
        ({"truncated": "mask"}, [RIGHT, CUT, CUT], [True, False, False], {"rollout/filtered_truncated": 2}),
        (
            {"truncated": "mask"},
            [CUT, CUT_RIGHT],
            [],
            {"rollout/filtered_truncated": 2, "rollout/filtered_small_groups": 1},
        ),
        ({"truncated": "drop"}, [RIGHT, CUT, WRONG], [True, True], {"rollout/filtered_truncated": 1}),
        (
            {"truncated": "drop"},
            [RIGHT, CUT],
            [],
            {"rollout/filtered_truncated": 1, "rollout/filtered_small_groups": 1},
        ),
        ({"duplicates": "drop"}, [RIGHT, AGAIN, WRONG], [True, True], {"rollout/filtered_duplicates": 1}),
        (
            {"duplicates": "drop"},
            [RIGHT, AGAIN],
            [],
            {"rollout/filtered_duplicates": 1, "rollout/filtered_small_groups": 1},
        ),
        ({"zero_std_groups": "drop"}, [WRONG, CUT], [], {"rollout/filtered_zero_std_groups": 1}),
        ({"zero_std_groups": "drop"}, [WRONG, RIGHT], [True, True], {}),
        # Without the wrong response, which is truncated, all rewards of the group are equal.
        (
            {"zero_std_groups": "drop", "truncated": "drop"},
            [RIGHT, AGAIN, CUT],
            [],
            {"rollout/filtered_truncated": 1, "rollout/filtered_zero_std_groups": 1},
        ),
        (
            {"zero_std_groups": "drop", "truncated": "mask"},
            [RIGHT, AGAIN, CUT],
            [True, True, False],
            {"rollout/filtered_truncated": 1},
        ),
        (
            {"duplicates": "drop", "truncated": "mask"},
            [CUT, CUT, RIGHT],
            [False, True],
            {"rollout/filtered_duplicates": 1, "rollout/filtered_truncated": 1},
        ),
    ],
)
def test_filters_together(settings, group, left, counts):
    result, counted = apply_filters(group, build_filters(FilterConfig(**settings)))
    assert ([one.in_loss for one in result], dict(counted)) == (left, counts)


@given(st.lists(st.lists(st.sampled_from([0.0, 0.1, 1.0]), min_size=2, max_size=5), min_size=1, max_size=5))
def test_ragged_groups_have_the_advantages_of_each_alone(groups):
    rewards = torch.tensor([reward for group in groups for reward in group])
    alone = [group_advantages(torch.tensor([group])).flatten() for group in groups]
    together = ragged_group_advantages(rewards, [len(group) for group in groups])
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-6, atol=1e-6)


def test_masked_responses_have_no_position_in_the_loss():
    rows = make_batch([RIGHT, replace(CUT, in_loss=False)], [0, 1], 0, "cpu")
    assert rows.mask_BL.sum(dim=1).tolist() == [2, 0]


class Scripted:
    """An engine with scripted responses, prompt by prompt; None is a failed request."""

    def __init__(self, completions: Sequence[Sequence[int | None]]):
        self.completions, self.requests = list(completions), []

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Outcome]:
        self.requests.append((requests, sampling))
        prompts = list(dict.fromkeys(request.id.rpartition("-")[0] for request in requests))
        assert len(prompts) == 1
        script = [token for group in self.completions[: len(requests) // 2] for token in group]
        del self.completions[: len(requests) // 2]
        return [
            FailedRequest(request.id, "no reply")
            if token is None
            else Completion(request.id, make_response(request.prompt_tokens, (token,), (-0.5,)), "stop", "0")
            for request, token in zip(requests, script, strict=True)
        ]

    busy_seconds = 0.0

    def abandon(self) -> None: ...
    def health(self) -> dict[str, int]:
        return {}


@pytest.fixture(scope="module")
def config() -> RunConfig:
    config = RunConfig()
    config.data.num_documents, config.data.reasoning_gym_share = 400, 0.0
    config.rl.prompts_per_rollout, config.rl.group_size = 3, 2
    return config


@pytest.fixture(scope="module")
def tokenizer(config):
    return train_tokenizer(config.data)


def odd_length(_, texts: Sequence[str]) -> list[Score | Unscored]:
    """1 for texts of an odd number of characters, else 0."""
    return [Score(float(len(text) % 2), {"accuracy": float(len(text) % 2)}) for text in texts]


@pytest.fixture
def rollouts(config, tokenizer, tmp_path):
    def make(completions, scorer=odd_length, **filters) -> tuple[Rollouts, Scripted]:
        config.rl.filters = FilterConfig(**filters)
        engine = Scripted(completions)
        journal = Journal(tmp_path / "rollouts")
        formatter = PromptFormatter(tokenizer, "r1_zero")
        prompts = TrainingPrompts(config.data)
        return Rollouts(prompts, engine, formatter, journal, scorer, config.rollout, config.rl, config.seed), engine

    return make


@pytest.fixture(scope="module")
def two_kinds(tokenizer) -> tuple[int, int]:
    """A token whose text has an even number of characters, and one whose text has an odd number."""
    lengths = {len(tokenizer.decode((token,), skip_special=True)) % 2: token for token in range(50, 400)}
    return lengths[0], lengths[1]


def test_dropped_groups_are_refilled_by_prompts_that_no_other_step_has(rollouts, config, two_kinds):
    zero, one = two_kinds
    script = [[zero, one], [one, one], [zero, zero], [one, one], [one, zero], [zero, one]]
    taker, engine = rollouts(script, zero_std_groups="drop", max_resample_rounds=5)
    rollout = taker.take(step=4, first_prompt=10)
    assert [len(requests) for requests, _ in engine.requests] == [6, 4, 2]
    assert rollout.counts == {
        "rollout/lost_groups": 0,
        "rollout/unscored_groups": 0,
        "rollout/filtered_zero_std_groups": 3,
        "rollout/resampled_prompts": 3,
    }
    prompts, refills = TrainingPrompts(config.data), REFILLS + 10 * 5
    indices = [10, refills + 1, refills + 2]
    assert [sample.prompt_id for sample in rollout.samples[::2]] == [prompts.at(index).id for index in indices]
    assert [sample.group for sample in rollout.samples] == [0, 0, 1, 1, 2, 2]
    assert len({sampling.seed for _, sampling in engine.requests}) == 3
    names = [request.id for requests, _ in engine.requests for request in requests]
    assert len(set(names)) == len(names)
    again, silent = rollouts([], zero_std_groups="drop", max_resample_rounds=5)
    assert again.take(step=4, first_prompt=99) == rollout and silent.requests == []


def test_rounds_are_bounded_and_a_short_rollout_remains(rollouts, two_kinds):
    zero, one = two_kinds
    taker, engine = rollouts([[zero, one], [one, one], [one, one], [one, one], [one, one]],
                             zero_std_groups="drop", max_resample_rounds=1)  # fmt: skip
    rollout = taker.take(step=1, first_prompt=0)
    assert (len(rollout.samples), rollout.counts["rollout/resampled_prompts"], len(engine.requests)) == (2, 2, 2)


def test_groups_are_used_where_filters_would_drop_all(rollouts, two_kinds):
    _, one = two_kinds
    taker, _ = rollouts([[one, one]] * 3, zero_std_groups="drop")
    rollout = taker.take(step=1, first_prompt=0)
    assert (len(rollout.samples), rollout.counts["rollout/filtered_zero_std_groups"]) == (6, 3)


def test_failed_requests_cost_their_group_and_are_counted(rollouts, two_kinds):
    zero, one = two_kinds
    taker, _ = rollouts([[zero, one], [None, one], [one, zero]])
    rollout = taker.take(step=1, first_prompt=0)
    assert (len(rollout.samples), rollout.counts) == (4, {"rollout/lost_groups": 1, "rollout/unscored_groups": 0})
    assert rollouts([])[0].take(step=1, first_prompt=0) == rollout
    taker, _ = rollouts([[None, one]] * 3)
    with pytest.raises(NoRolloutCapacity, match="all its prompts were lost; the last one: no reply"):
        taker.take(step=2, first_prompt=0)


def test_unscored_responses_cost_their_group_and_are_counted_separately(rollouts, two_kinds):
    """A judge that is down does not make a response wrong: the group is not trained on."""
    zero, one = two_kinds

    def third_unscored(prompts, texts):
        return [Unscored("no sandbox") if i == 2 else score for i, score in enumerate(odd_length(prompts, texts))]

    taker, _ = rollouts([[zero, one], [one, one], [None, zero]], third_unscored)
    rollout = taker.take(step=1, first_prompt=0)
    assert (len(rollout.samples), rollout.counts) == (2, {"rollout/lost_groups": 1, "rollout/unscored_groups": 1})
    taker, _ = rollouts([[zero, one]] * 3, lambda prompts, texts: [Unscored("no sandbox")] * len(texts))
    with pytest.raises(NoRolloutCapacity, match="all its prompts were lost; the last one: no sandbox"):
        taker.take(step=2, first_prompt=0)


def test_an_ordinary_rollout_leaves_no_notes(rollouts, two_kinds, tmp_path):
    zero, one = two_kinds
    taker, _ = rollouts([[zero, one]] * 3)
    rollout = taker.take(step=1, first_prompt=0)
    assert rollout.counts == {"rollout/lost_groups": 0, "rollout/unscored_groups": 0}
    assert Journal(tmp_path / "rollouts").read_all(1)[1] == {}
