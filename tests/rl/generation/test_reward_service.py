"""Reward models score rollouts of other threads in the trainer's thread alone, and nobody waits for them for ever."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from megatron_r1.data.prompts.prompts import Prompt
from megatron_r1.errors import NoRolloutCapacity
from megatron_r1.rewards import score as score_module
from megatron_r1.rewards.reward import Unscored
from megatron_r1.rewards.score import Rubric, TextRule, Weighted
from megatron_r1.rl.generation.async_rollouts import AsyncRollouts
from megatron_r1.rl.generation.reward_service import CollectiveRewardService
from megatron_r1.rl.generation.rollouts import Rollout
from tests.support.samples import make_sample

pytestmark = [pytest.mark.usefixtures("one_rank"), pytest.mark.timeout(20)]
PROMPT = Prompt("train-0", "?", "", "", "number")
LAST = 6


class Letters:
    """Counts a letter; records the threads that call it, fails at some texts, leaves others unscored once."""

    def __init__(self, letter: str):
        self.name = self.letter = letter
        self.threads, self.scored = set[int](), list[str]()

    def score(self, prompts, texts):
        self.threads.add(threading.get_ident())
        assert len(prompts) == len(texts)
        if "broken" in texts:
            raise RuntimeError("cannot read this")
        values = [float(text.count(self.letter)) if self.knows(text) else Unscored("not yet") for text in texts]
        self.scored += texts
        return values

    def knows(self, text: str) -> bool:
        return not text.startswith("later") or text in self.scored


class Source:
    """Takes rollouts of one response each, scored by a rubric; a step may have another text or an action first."""

    def __init__(self, rubric: Rubric, texts: dict[int, str] | None = None, first: dict | None = None):
        self.rubric, self.texts, self.first = rubric, texts or {}, first or {}
        self.busy_seconds, self.ended = 0.0, dict[int, BaseException]()

    def take(self, step: int, first_prompt: int) -> Rollout:
        try:
            self.first.get(step, lambda: None)()
            (score,) = self.rubric([PROMPT], [self.texts.get(step, "a" * step + "b")])
        except BaseException as error:
            self.ended[step] = error
            raise
        reward, parts = score.total, score.parts
        return Rollout([make_sample(reward=reward, reward_parts=parts)], {})


@pytest.fixture
def models() -> list[Letters]:
    return [Letters("a"), Letters("b")]


@pytest.fixture
def service(models) -> CollectiveRewardService:
    return CollectiveRewardService([Weighted(1.0, models[0]), Weighted(0.5, models[1])])


def ahead_of(source: Source, service: CollectiveRewardService, ahead: int = 2, abandon=lambda: None) -> AsyncRollouts:
    return AsyncRollouts(source, ahead, 1, LAST, abandon, service)


@pytest.mark.parametrize("ahead", [1, 3])
def test_only_the_trainers_thread_scores_and_every_rollout_gets_its_own(service, models, ahead):
    rubric = Rubric([*service.rewards, Weighted(2.0, TextRule("rule", len))])
    with ahead_of(Source(rubric), service, ahead) as rollouts:
        samples = [rollouts.take(step, step - 1).samples[0] for step in range(1, LAST + 1)]
    for step, sample in enumerate(samples, start=1):
        assert sample.reward_parts == {"a": step, "b": 0.5, "rule": 2 * (step + 1)}
    for model in models:
        assert model.threads == {threading.get_ident()} and len(model.scored) == LAST


def test_the_trainers_thread_does_not_wait_for_itself(service):
    source = Source(Rubric(service.rewards))
    assert [source.take(step, 0).samples[0].reward for step in (1, 2)] == [1.5, 2.5]


def test_who_waits_is_served_though_the_trainer_has_what_it_wants(service):
    done: Future[str] = Future()
    done.set_result("rollout")
    with ThreadPoolExecutor(1) as threads:
        later = threads.submit(Source(Rubric(service.rewards)).take, 3, 0)
        while not later.done():
            assert service.wait(done) == "rollout"
        assert later.result().samples[0].reward == 3.5


def test_unscored_responses_are_retried_in_the_same_way(service, models, monkeypatch):
    monkeypatch.setattr(score_module, "FIRST_PAUSE_S", 0.001)
    source = Source(Rubric(service.rewards, retries=1), {2: "later ab"})
    with ahead_of(source, service) as rollouts:
        assert rollouts.take(1, 0).samples[0].reward == 1.5
        assert rollouts.take(2, 1).samples[0].reward == 2 + 0.5
    assert models[0].scored.count("later ab") == 2 and models[0].threads == {threading.get_ident()}


def test_a_thread_that_dies_does_not_keep_the_trainer(service):
    def die() -> None:
        time.sleep(0.05)
        raise ValueError("lost its way")

    with ahead_of(Source(Rubric(service.rewards), first={2: die}), service) as rollouts:
        assert rollouts.take(1, 0).samples[0].reward == 1.5
        with pytest.raises(ValueError, match="lost its way"):
            rollouts.take(2, 1)


def test_a_failure_to_score_ends_the_run_and_all_that_waits(service):
    """Step 1 is being answered when step 2's scores fail, and asks for its own when it is abandoned."""
    abandoned, began = threading.Event(), time.monotonic()
    source = Source(Rubric(service.rewards), {2: "broken"}, {1: abandoned.wait})
    with ahead_of(source, service, 1, abandoned.set) as rollouts:
        with pytest.raises(RuntimeError, match="cannot read this"):
            rollouts.take(1, 0)
        while 2 not in source.ended:
            time.sleep(0.01)
        time.sleep(0.05)  # of the two threads, one is left
    assert time.monotonic() - began < 5
    assert isinstance(source.ended[1], NoRolloutCapacity) and isinstance(source.ended[2], RuntimeError)


def test_the_end_of_a_run_releases_who_waits_for_scores(service, models):
    learning = threading.Event()
    source = Source(Rubric(service.rewards), first={3: learning.wait})
    with ahead_of(source, service) as rollouts:
        rollouts.take(1, 0)
        learning.set()
        time.sleep(0.1)
    assert isinstance(source.ended[3], NoRolloutCapacity) and "a" * 3 + "b" not in models[0].scored
    with ThreadPoolExecutor(1) as threads, pytest.raises(NoRolloutCapacity, match="the run ends"):
        threads.submit(source.take, 4, 0).result(5)
