"""Workers that can be killed: what hangs, what dies, what never starts; and 200 answers made to do all of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from megatron_r1.config.reward import MathConfig
from megatron_r1.rewards.mathematics import MathVerifier
from megatron_r1.rewards.reward import Unscored
from megatron_r1.rewards.workers import WorkerPool, WorkersDown
from tests.support.hostile_answers import hostile_answers
from tests.support.odd_verifier import cannot_start, verify

ROOT = Path(__file__).parents[2]
DEADLINE_S = 1.0


@pytest.fixture
def pool():
    with WorkerPool(verify, bool, workers=2, deadline_s=DEADLINE_S) as pool:
        yield pool


@pytest.fixture
def pids(pool, tmp_path):
    """Asks, and returns the worker that replied."""

    def ask() -> int:
        assert pool.ask("pid", str(tmp_path / "pids"))
        return int((tmp_path / "pids").read_text().split()[-1])

    return ask


def test_replies_come_from_processes_that_stay(pool, pids, capfd):
    assert pool.ask("right") is True and pool.ask("wrong") is False
    first = {pids() for _ in range(20)}
    assert os.getpid() not in first and len(first) <= 3
    assert pool.ask("own session") is True
    assert pool.ask("print") is True and capfd.readouterr() == ("", "")
    assert pool.ask("memory") is False
    assert pool.ask("exit") is False, "a verifier's exit is not the trainer's"
    assert pool.ask("sleep") is False, "the alarm stops it"
    assert len(first | {pids() for _ in range(20)}) <= 3 and pool.killed == 0


@pytest.mark.parametrize("stubborn", ["ignore signals", "native code"])
def test_a_worker_that_hangs_is_killed_and_replaced(pool, pids, stubborn):
    pids()
    started = time.monotonic()
    assert pool.ask(stubborn) is False
    assert DEADLINE_S <= time.monotonic() - started < DEADLINE_S + (5 if stubborn == "ignore signals" else 2)
    assert pool.killed == 1
    assert pids() > 0


def test_an_answer_that_kills_its_worker_is_tried_twice(pool, tmp_path):
    assert pool.ask("die") is False
    assert pool.killed == 2
    assert pool.ask("die once", str(tmp_path / "mark")) is True
    assert pool.killed == 3


def test_workers_killed_from_outside_cost_nothing(pool, pids):
    for pause_s in (0, 0, 0.3, 0.3):
        os.kill(pids(), signal.SIGKILL)
        time.sleep(pause_s)
        assert pids() > 0


def test_many_threads_get_their_own_replies(pool):
    with ThreadPoolExecutor(8) as threads:
        expected = ["right" if n % 3 else "wrong" for n in range(300)]
        assert list(threads.map(pool.ask, expected)) == [word == "right" for word in expected]


def test_a_closed_pool_leaves_no_process(pool, pids):
    pids()
    children = psutil.Process().children()
    workers = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
    with ThreadPoolExecutor(1) as threads:
        hanging = threads.submit(pool.ask, "native code")
        time.sleep(0.2)
        started = time.monotonic()
        pool.close()
        assert time.monotonic() - started < 2.0
        with pytest.raises(WorkersDown, match="closed"):
            hanging.result()
    assert len(workers) == 3 and not any(worker.is_running() for worker in workers)
    with pytest.raises(WorkersDown, match="closed"):
        pool.ask("right")


TRAINER = """
import threading, time
from megatron_r1.rewards.workers import WorkerPool
from tests.support.odd_verifier import verify

if __name__ == "__main__":
    pool = WorkerPool(verify, bool, workers=2, deadline_s=600.0)
    pool.ask("right")
    threading.Thread(target=pool.ask, args=("native code",)).start()
    time.sleep(0.5)
    print("asked", flush=True)
    time.sleep(600)
"""


def test_workers_do_not_outlive_a_killed_trainer(tmp_path):
    (tmp_path / "trainer.py").write_text(TRAINER)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, tmp_path / "trainer.py"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as trainer:
        assert trainer.stdout
        assert trainer.stdout.readline() == b"asked\n"
        processes = psutil.Process(trainer.pid).children(recursive=True)
        trainer.kill()
        _, alive = psutil.wait_procs(processes, timeout=5.0)
        for process in alive:
            process.kill()
    assert len(processes) >= 3 and alive == []


def test_workers_that_cannot_start_are_no_verdict(monkeypatch):
    pool = WorkerPool(verify, cannot_start, workers=2, deadline_s=DEADLINE_S)
    with pool, pytest.raises(WorkersDown, match="they do not start"):
        pool.ask("right")
    verifier = MathVerifier(MathConfig())
    monkeypatch.setattr(verifier, "pool", pool)
    assert verifier.is_correct("\\sqrt{196}", "14") == Unscored("math workers: the pool is closed")
    assert verifier.is_correct("14", "14") is True, "numbers need no worker"


def rate(verifier: MathVerifier, count: int) -> float:
    """Correct answers per second that need a worker; on a busy machine the alarm may stop one in twenty."""
    started = time.monotonic()
    answers = [f"\\frac{{{2 * n}}}{{2}}" for n in range(count)]
    verdicts = verifier.verdicts(answers, [str(n) for n in range(count)])
    assert verdicts.count(True) >= 0.95 * count, (verdicts, verifier.pool.killed)
    return count / (time.monotonic() - started)


def verify_all(answers: list[str], config: MathConfig, most_s: float) -> tuple[MathVerifier, float, float]:
    """Every answer is found wrong in time; returns the pool's speed before and 2 s after."""
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
    verifier, before, after = verify_all(hostile_answers()[::4], MathConfig(timeout_s=1.0), most_s=6.0)
    verifier.close()
    assert after > before / 4 and list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_hostile_answers_with_the_usual_deadline(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    answers = hostile_answers()
    assert len(answers) == 200
    verifier, before, after = verify_all(answers, MathConfig(), most_s=6.0)
    verifier.close()
    assert after > 0.8 * before and list(tmp_path.iterdir()) == []
