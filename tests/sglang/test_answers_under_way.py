"""A real server whose weights change under this program's own answers: which token is of which weights."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from megatron_r1.config.sglang import SGLangConfig
from megatron_r1.errors import NoRolloutCapacity
from megatron_r1.rollout.engine import Completion, Request, Sampling
from megatron_r1.rollout.sglang.engine import SGLangEngine
from megatron_r1.rollout.sglang.pause import PAUSES
from tests.support.agreement import disagreement
from tests.support.samples import logprobs_of, prompt_of, row_of, tokens_of

pytestmark = [pytest.mark.sglang]
LONG = Sampling(temperature=1.0, top_p=1.0, max_tokens=50, stop_tokens=(), seed=0)


@pytest.fixture(scope="module")
def engine(models, tmp_path_factory):
    config = SGLangConfig(max_running_requests=16, max_total_tokens=4096, request_timeout_s=60.0)
    config.pool.requests_per_call = 8
    config.pool.in_flight_per_server = 32
    logs = tmp_path_factory.mktemp("logs")
    with SGLangEngine(models[0][0], config, logs, "cpu", "float32", context_length=64) as engine:
        yield engine


@pytest.fixture
def pause(engine, models, monkeypatch):
    """Sets what becomes of answers under way; the server begins with the first weights, called 0."""

    def pause(name: str) -> None:
        monkeypatch.setattr(engine, "pause", PAUSES[name])
        engine.load_weights(models[0][0], "0")

    return pause


def requests(count: int) -> list[Request]:
    draw = random.Random(count)
    return [Request(str(i), tuple(draw.randrange(3, 160) for _ in range(draw.randrange(2, 12)))) for i in range(count)]


def under_way(engine, asked: list[Request], change: Callable[[], None]) -> list[Completion]:
    """The answers, while `change` happens in this thread once the first are there and others are under way."""
    with ThreadPoolExecutor(1) as threads:
        answers = threads.submit(engine.generate, asked, LONG)
        while not any(answered for answered, _ in engine.progress()):
            time.sleep(0.001)
        change()
        return answers.result(timeout=60)


def gap(models, one: Completion) -> float:
    """Of an answer's log-probabilities from those that the weights of each token's version give."""
    versions = dict([(0, one.weight_version), *one.version_changes])
    tokens = row_of(one)
    largest, version = 0.0, ""
    for place, (token, logprob) in enumerate(zip(tokens_of(one), logprobs_of(one).tolist(), strict=True)):
        version = versions.get(place, version)
        with torch.no_grad():
            logits_LV = logits(models[1][int(version)], tokens)
        expected = logits_LV[len(prompt_of(one)) + place - 1].log_softmax(-1)[token]
        largest = max(largest, abs(float(expected) - logprob))
    return largest


def logits(model, tokens, cache={}) -> torch.Tensor:  # noqa: B006 (kept on purpose)
    key = id(model), tuple(tokens[0].tolist())
    if key not in cache:
        cache[key] = model(tokens).logits[0]
    return cache[key]


@pytest.mark.parametrize("name", ["finish", "retract", "in_place"])
def test_every_token_is_of_the_weights_that_its_version_names(engine, models, pause, name):
    pause(name)

    def twice() -> None:
        for version in (1, 2):
            engine.load_weights(models[0][version], str(version))
            time.sleep(0.1)

    asked = requests(96)  # several times what runs at a time
    answers = under_way(engine, asked, twice)
    assert [one.request_id for one in answers] == [one.id for one in asked]
    assert {one.weight_version for one in answers} >= {"0", "2"} and engine.version == "2"
    continued = [one for one in answers if one.version_changes]
    assert bool(continued) == (name != "finish")
    whole = [one for one in answers if not one.version_changes]
    if name == "in_place":  # keys and values of the old weights live on, in the cache of later prompts too
        assert max(gap(models, one) for one in continued) > 1e-2
    else:
        assert disagreement(gap(models, one) for one in whole[:12] + continued[:12]) < 1e-4


def test_responses_that_a_failed_update_leaves_in_doubt_are_retried(engine, models, pause):
    pause("retract")

    def fails_then_succeeds() -> None:
        with pytest.raises(RuntimeError, match="sender is gone"), engine.receiving("half"):
            raise RuntimeError("the sender is gone")
        time.sleep(0.2)
        engine.load_weights(models[0][3], "3")

    answers = under_way(engine, requests(32), fails_then_succeeds)
    assert {one.weight_version for one in answers} <= {"0", "3"} and answers[-1].weight_version == "3"
    assert not any(one.version_changes for one in answers)
    assert disagreement(gap(models, one) for one in answers[:4] + answers[-4:]) < 1e-4


def test_abandoned_requests_end_at_once_and_the_server_continues(engine, pause):
    pause("retract")
    stop = threading.Timer(0.3, engine.abandon)
    stop.start()
    began = time.monotonic()
    with pytest.raises(NoRolloutCapacity, match="abandoned"):
        engine.generate(requests(400), LONG)
    assert time.monotonic() - began < 5
    assert len(engine.generate(requests(4), LONG)) == 4
