"""Judges that can be killed: what hangs, what dies, what never starts; and 200 answers made to do all of it."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megatron_r1.config.reward import MathConfig
from megatron_r1.rewards.mathematics import MathVerifier
from megatron_r1.rewards.reward import Unscored
from megatron_r1.rewards.workers import Died, Timeout, WorkerPool, WorkersDown
from tests.support.hostile_answers import hostile_answers

SUPPORT = Path(__file__).parents[1] / "support"
DEADLINE_S = 1.0


@pytest.fixture
def pool(monkeypatch):
    monkeypatch.syspath_prepend(str(SUPPORT))
    with WorkerPool("odd_worker", [], workers=2, deadline_s=DEADLINE_S) as pool:
        yield pool


def test_replies_come_from_processes_that_stay(pool):
    first = {pool.ask({"do": "pid"}) for _ in range(20)}
    assert os.getpid() not in first and len(first) <= 3 and pool.killed == 0


def test_a_worker_that_hangs_is_killed_and_replaced(pool):
    pool.ask({"do": "pid"})
    for stubborn in ("sleep", "ignore signals"):
        started = time.monotonic()
        with pytest.raises(Timeout):
            pool.ask({"do": stubborn})
        assert DEADLINE_S <= time.monotonic() - started < DEADLINE_S + 3
    assert pool.killed == 2
    assert pool.ask({"do": "pid"}) > 0


def test_an_item_that_kills_its_worker_is_tried_twice(pool, tmp_path):
    with pytest.raises(Died):
        pool.ask({"do": "die"})
    assert pool.killed == 2
    once = {"do": "die once", "mark": str(tmp_path / "mark")}
    assert pool.ask(once) == "second" and pool.killed == 3


def test_workers_killed_from_outside_cost_nothing(pool):
    for _ in range(5):
        os.kill(pool.ask({"do": "pid"}), signal.SIGKILL)
        assert pool.ask({"do": "pid"}) > 0


def test_many_threads_get_their_own_replies(pool):
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(lambda n: pool.ask({"do": "echo", "n": n}), range(300))) == list(range(300))


def test_a_closed_pool_leaves_no_process(monkeypatch):
    monkeypatch.syspath_prepend(str(SUPPORT))
    with WorkerPool("odd_worker", [], workers=2, deadline_s=DEADLINE_S) as pool:
        asking = threading.Thread(target=lambda: pool.ask({"do": "echo", "n": 1}))
        pids = {pool.ask({"do": "pid"}) for _ in range(5)}
        asking.start()
        asking.join()
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    with pytest.raises(WorkersDown, match="closed"):
        pool.ask({"do": "pid"})


def test_workers_that_cannot_start_are_no_verdict(monkeypatch):
    pool = WorkerPool("megatron_r1.no_such_worker", [], workers=2, deadline_s=DEADLINE_S)
    with pool, pytest.raises(WorkersDown, match="no_such_worker does not start"):
        pool.ask({})
    verifier = MathVerifier(MathConfig())
    monkeypatch.setattr(verifier, "pool", pool)
    assert verifier.is_correct("\\frac{28}{2}", "14") == Unscored("math workers: the pool is closed")
    assert verifier.is_correct("14", "14") is True, "numbers need no worker"


def rate(verifier: MathVerifier, count: int) -> float:
    """Answers a second, all right, that need a worker."""
    started = time.monotonic()
    answers = [f"\\frac{{{2 * n}}}{{2}}" for n in range(count)]
    assert all(right is True for right in verifier.verdicts(answers, [str(n) for n in range(count)]))
    return count / (time.monotonic() - started)


def judge_all(answers: list[str], config: MathConfig, most_s: float) -> tuple[MathVerifier, float, float]:
    """Every answer is wrong, and says so in time; then the pool's speed before and 2 s after."""
    verifier = MathVerifier(config)

    def one(answer: str) -> float:
        started = time.monotonic()
        assert verifier.is_correct(answer, "14") is False, json.dumps(answer)[:100]
        return time.monotonic() - started

    rate(verifier, 20)
    before = rate(verifier, 100)
    with ThreadPoolExecutor(config.workers) as threads:
        slowest = max(threads.map(one, answers))
    assert slowest < most_s
    time.sleep(2.0)
    after = rate(verifier, 100)
    print(f"\n{len(answers)} answers, slowest {slowest:.2f} s, {verifier.pool.killed} workers killed,", end=" ")
    print(f"{before:.0f} answers a second before, {after:.0f} after; load {os.getloadavg()[0]:.1f}")
    return verifier, before, after


def test_hostile_answers_are_wrong_in_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    verifier, before, after = judge_all(hostile_answers()[::4], MathConfig(timeout_s=1.0), most_s=6.0)
    verifier.close()
    assert after > before / 4 and list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_hostile_answers_with_the_usual_deadline(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    answers = hostile_answers()
    assert len(answers) == 200
    verifier, before, after = judge_all(answers, MathConfig(), most_s=6.0)
    verifier.close()
    assert after > 0.8 * before and list(tmp_path.iterdir()) == []
