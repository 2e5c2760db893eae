"""The pool against servers that misbehave: every request is answered once or counted as lost, in bounded time."""

import asyncio
import os
import signal
import time
from collections import Counter
from contextlib import asynccontextmanager

import psutil
import pytest

from megatron_r1.config.sglang import PoolConfig
from megatron_r1.errors import NoRolloutCapacity
from megatron_r1.rollout.engine import Completion, FailedRequest, Request, Sampling
from megatron_r1.rollout.sglang.client import Client, new_session
from megatron_r1.rollout.sglang.pool.pool import Pool
from megatron_r1.rollout.sglang.pool.server import PoolServer
from tests.support.fake_sglang import FAULTS, KEY, fakes, toy_answer
from tests.support.samples import make_response

SAMPLING = Sampling(1.0, 1.0, 16, (), 0)
DEADLINE_S = 6.0
QUICK = {"requests_per_call": 1, "in_flight_per_server": 64, "give_up_s": DEADLINE_S, "capacity_timeout_s": 2.0}


def requests(count: int, each: int = 1) -> list[Request]:
    prompts = [tuple(3 + (number * 13 + place * 7) % 500 for place in range(8 + number % 9)) for number in range(count)]
    return [
        Request(f"{number}-{i}", (number + 3, *prompt)) for number, prompt in enumerate(prompts) for i in range(each)
    ]


@asynccontextmanager
async def pool_of(running, timeout_s=5.0, hopeless=str, version="v", **config):
    config = PoolConfig(**(QUICK | config))
    async with new_session() as session:
        members = [PoolServer(Client(one.url, KEY, "", timeout_s, session), config, "v") for one in running]
        for member in members:
            member.open()
        yield Pool(members, config, timeout_s, [version], hopeless)


def ask(running, asked, version="v", **options):
    async def run():
        async with pool_of(running, version=version, **options) as pool:
            began = time.monotonic()
            outcomes = await pool.generate(asked, SAMPLING)
            return outcomes, time.monotonic() - began, pool

    return asyncio.run(run())


def check(asked, outcomes) -> int:
    """Every outcome is the right answer to its own request, or the request is told lost; returns the lost."""
    assert [one.request_id for one in outcomes] == [one.id for one in asked]
    for request, outcome in zip(asked, outcomes, strict=True):
        if isinstance(outcome, Completion):
            tokens, logprobs = toy_answer(request.prompt_tokens, SAMPLING.max_tokens)
            assert outcome.response == make_response(request.prompt_tokens, tokens, logprobs)
            assert outcome.weight_version == "v"
    return sum(isinstance(one, FailedRequest) for one in outcomes)


@pytest.fixture(scope="module")
def four():
    with fakes(4) as running:
        yield running


@pytest.fixture
def healthy(four):
    for one in four:
        one.behave(fault="", share=0.0, version="v", seconds=0.0)
    return four


def test_fourteen_kinds_of_bad_reply(healthy):
    asked = requests(2000)
    outcomes, fault_free_s, _ = ask(healthy, asked)
    assert check(asked, outcomes) == 0
    before = faults_of(healthy)
    for one in healthy:
        one.behave(share=0.02)
    memory = psutil.Process().memory_info().rss
    outcomes, seconds, pool = ask(healthy, asked, timeout_s=1.0)
    lost, grown = check(asked, outcomes), psutil.Process().memory_info().rss - memory
    faults = faults_of(healthy) - before
    print(f"{sum(faults.values())} faults; {fault_free_s:.1f} s without, {seconds:.1f} s with; {lost} lost; "
          f"{grown / 1e6:.0f} MB more; {dict(pool.counts)}")  # fmt: skip
    assert all(faults[f"fault {fault}"] >= 10 for fault in FAULTS)
    assert lost <= len(asked) // 100  # to hangs, one after the other, on a busy machine
    assert pool.counts["answered"] == len(asked) - lost
    assert seconds < fault_free_s + 2 * DEADLINE_S
    assert grown < 200e6


def faults_of(running) -> Counter:
    """Faults that the servers say they committed."""
    return sum((Counter({k: v for k, v in one.counts().items() if "fault" in k}) for one in running), Counter())


@pytest.mark.parametrize("fault", FAULTS)
def test_one_server_that_always_fails_is_left_alone(healthy, fault):
    healthy[0].behave(fault=fault)
    before = healthy[0].counts()["calls"]
    asked = requests(200)
    # Calls have time enough for a stalled machine: only the server that fails may make them fail.
    options = {"timeout_s": 2.0, "give_up_s": 30.0, "breaker_failures": 5, "in_flight_per_server": 8}
    outcomes, _, pool = ask(healthy, asked, **options)
    assert check(asked, outcomes) == 0
    assert not pool.servers[0].breaker.closed
    # Those under way when the breaker opens, and what tries it. No lower bound: on a stalled machine calls fail unsent.
    assert healthy[0].counts()["calls"] - before < 50


def test_a_storm_of_errors_is_not_answered_with_a_storm_of_retries(healthy):
    for one in healthy:
        one.behave(fault="error_500")
    before = sum(one.counts()["calls"] for one in healthy)
    options = {"give_up_s": 5.0, "retry_floor_per_s": 1.0, "breaker_failures": 10_000, "in_flight_per_server": 1000}
    asked = requests(1000)
    outcomes, seconds, _ = ask(healthy, asked, **options)
    calls = sum(one.counts()["calls"] for one in healthy) - before
    # On a slow machine some calls of so many are late instead.
    assert check(asked, outcomes) == 1000 and any("status 500" in outcome.reason for outcome in outcomes)
    assert calls <= 1000 * 1.1 + 4 * 1.0 * (10.0 + seconds) + 1


def test_servers_that_fail_for_good_are_no_capacity(healthy):
    for one in healthy:
        one.behave(fault="error_500")
    began = time.monotonic()
    with pytest.raises(NoRolloutCapacity, match="no server for 0.5 s: .*calls fail"):
        ask(healthy, requests(100), capacity_timeout_s=0.5, breaker_failures=3)
    assert time.monotonic() - began < 5


def test_breaker_closes_again_when_its_server_is_well(healthy):
    async def run():
        async with pool_of(healthy[:1], breaker_failures=3, breaker_cooldown_s=0.1, give_up_s=30.0) as pool:
            healthy[0].behave(fault="error_500")
            asked = requests(20)
            answers = asyncio.ensure_future(pool.generate(asked, SAMPLING))
            while pool.servers[0].breaker.closed:  # pytest's deadline is its own
                await asyncio.sleep(0.05)
            await asyncio.to_thread(healthy[0].behave, fault="")
            return asked, await answers

    assert check(*asyncio.run(run())) == 0


def test_only_the_bad_reply_of_a_call_is_retried(healthy):
    healthy[0].behave(fault="wrong_version")
    asked = requests(16, each=4)
    outcomes, _, pool = ask(healthy[:2], asked, requests_per_call=16)
    assert check(asked, outcomes) == 0
    assert 1 <= pool.counts["resent"] <= 2 * pool.counts["calls"]  # one of the call's 16
    assert pool.servers[0].breaker.closed


def test_what_every_server_refuses_is_lost_at_once(healthy):
    for one in healthy:
        one.behave(fault="refused")
    outcomes, seconds, pool = ask(healthy, requests(5), give_up_s=60.0)
    assert check(requests(5), outcomes) == 5 and "status 400: {'error': 'too long'}" in outcomes[0].reason
    assert seconds < 5 and pool.counts["calls"] == 15


def test_server_killed_while_it_answers(healthy):
    with fakes(2, seconds=0.3) as running:

        async def run():
            async with pool_of(running, in_flight_per_server=1000, retry_floor_per_s=0.01) as pool:
                for member, one in zip(pool.servers, running, strict=True):
                    member.gone = lambda process=one.process: process.poll() is not None
                asked = requests(100)
                answers = asyncio.ensure_future(pool.generate(asked, SAMPLING))
                await asyncio.sleep(0.15)
                os.kill(running[0].process.pid, signal.SIGKILL)
                return asked, await answers, pool

        began = time.monotonic()
        asked, outcomes, pool = asyncio.run(run())
        assert check(asked, outcomes) == 0 and time.monotonic() - began < DEADLINE_S
        assert pool.counts["calls"] > 100  # some were under way; that they are sent again needs no budget


def test_evicted_calls_go_elsewhere_and_drained_ones_end(healthy):
    healthy[0].behave(fault="hang")
    healthy[1].behave(seconds=0.2)

    async def run():
        async with pool_of(
            healthy[:2], timeout_s=60.0, give_up_s=60.0, retry_floor_per_s=0.01, capacity_timeout_s=0.5
        ) as pool:
            asked = requests(40)
            answers = asyncio.ensure_future(pool.generate(asked, SAMPLING))
            await asyncio.sleep(0.1)
            assert pool.servers[0].in_flight > 0
            pool.servers[0].evict("it hangs")
            outcomes = await answers
            pool.servers[0].open()
            healthy[0].behave(fault="", seconds=0.2)
            more = asyncio.ensure_future(pool.generate(asked, SAMPLING))
            await asyncio.sleep(0.1)
            under_way = sum(member.in_flight for member in pool.servers)
            with pool.hold("update"):
                await pool.drained()
                assert under_way > 0 == sum(member.in_flight for member in pool.servers)
                await asyncio.sleep(pool.config.capacity_timeout_s)  # no want of servers, however long it lasts
                for member in pool.servers:
                    member.open()
            return asked, outcomes, await more

    began = time.monotonic()
    asked, outcomes, more = asyncio.run(run())
    assert check(asked, outcomes) == 0 == check(asked, more)
    assert time.monotonic() - began < 10


def test_replies_of_other_weights_are_retried_elsewhere(healthy):
    healthy[0].behave(version="old")
    asked = requests(100)
    assert check(asked, ask(healthy, asked)[0]) == 0
    with pytest.raises(NoRolloutCapacity, match="no server"):
        ask(healthy, asked, version="new", capacity_timeout_s=0.2)
    with pytest.raises(NoRolloutCapacity, match="all is lost"):
        ask(healthy, asked, version="new", hopeless=lambda: "all is lost", capacity_timeout_s=60.0)


def test_an_interrupted_rollout_leaves_nothing_under_way(healthy):
    healthy[0].behave(fault="hang")

    async def run():
        async with pool_of(healthy[:1], timeout_s=60.0) as pool:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.3):
                    await pool.generate(requests(10), SAMPLING)
            await asyncio.sleep(0)
            return pool.servers[0]

    member = asyncio.run(run())
    assert (member.in_flight, member._calls) == (0, set())


def test_requests_are_served_in_order(healthy):
    healthy[0].behave(seconds=0.05)

    async def run():
        async with pool_of(healthy[:1], in_flight_per_server=4) as pool:
            asked, ended = requests(16), []

            async def caller(name: str) -> None:
                assert check(asked, await pool.generate(asked, SAMPLING)) == 0
                ended.append(name)

            await asyncio.gather(*[caller(name) for name in "abc"])
            assert pool.servers[0].busy.seconds >= 0.05 * 3 * 16 / 4
            return ended

    assert asyncio.run(run()) == ["a", "b", "c"]


def test_abandoned_callers_get_an_error(healthy):
    healthy[0].behave(fault="hang")

    async def run():
        async with pool_of(healthy[:1], timeout_s=60.0) as pool:
            answers = asyncio.ensure_future(pool.generate(requests(4), SAMPLING))
            await asyncio.sleep(0.2)
            pool.abandon()
            with pytest.raises(NoRolloutCapacity, match="abandoned"):
                await answers
            assert pool.servers[0].in_flight == 0
            healthy[0].behave(fault="")
            asked = requests(4)
            assert check(asked, await pool.generate(asked, SAMPLING)) == 0

    asyncio.run(run())
