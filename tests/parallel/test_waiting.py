"""Ranks wait for one another outside of collective operations, as long as the other lives; here ranks are threads."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from megatron_r1.checkpoint.store import SaveFailed
from megatron_r1.errors import ExitCode, NoRolloutCapacity, PlatformError, RankLost
from megatron_r1.parallel.mesh import claim_device
from megatron_r1.parallel.waiting import TELL_S, Waiting, note_signal
from tests.support.fork_server import run_forked_to_the_end

RANKS = 3
TIMEOUT_S = 0.4


def on_all_ranks(work: Callable[[int, Waiting], float], timeout_s: float = TIMEOUT_S) -> list[float]:
    """What `work` returns on each rank; an error of any rank is raised."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=20))

    def run(rank: int) -> float:
        waiting = Waiting(store, rank, RANKS, timeout_s)
        try:
            return work(rank, waiting)
        finally:
            waiting.close()

    with ThreadPoolExecutor(RANKS) as threads:
        return [future.result() for future in [threads.submit(run, rank) for rank in range(RANKS)]]


def test_others_wait_for_a_rank_that_works_longer_than_a_silent_one_may():
    def work(rank: int, waiting: Waiting) -> float:
        for slow in (0, 2):  # each wait is one of its own
            if rank == slow:
                time.sleep(2 * TIMEOUT_S)
            waiting.for_rank(slow)
        return time.monotonic()

    started = time.monotonic()
    assert min(on_all_ranks(work)) >= started + 4 * TIMEOUT_S


def test_all_wait_for_the_last():
    came, left = [], []

    def work(rank: int, waiting: Waiting) -> float:
        time.sleep(rank * TIMEOUT_S)
        came.append(time.monotonic())
        waiting.for_all()
        left.append(time.monotonic())
        return 0.0

    on_all_ranks(work)
    assert len(left) == RANKS and min(left) >= max(came)


def test_keys_of_waits_that_all_have_left_are_deleted():
    keys = []

    def work(rank: int, waiting: Waiting) -> float:
        for _ in range(20):
            waiting.for_all()
            waiting.for_rank(1)
        waiting.for_all()
        keys.append(waiting._store.num_keys())
        return 0.0

    on_all_ranks(work, timeout_s=20.0)
    assert max(keys) < 10, keys


@pytest.mark.parametrize("silent", [0, 2])
def test_a_rank_without_heartbeats_is_named(silent):
    """A rank that is stopped sends no more; the others are not left waiting."""
    lost, gone = [], threading.Event()

    def work(rank: int, waiting: Waiting) -> float:
        if rank == silent:
            waiting.heartbeats._stopped.set()
            gone.wait(20)
            return 0.0
        with pytest.raises(RankLost) as error:
            waiting.for_rank(silent)
        lost.append(error.value)
        if len(lost) == RANKS - 1:
            gone.set()
        return 0.0

    on_all_ranks(work)
    assert len(lost) == RANKS - 1
    assert all(str(error).startswith(f"rank {silent} on ") for error in lost)
    assert {error.exit_code for error in lost} == {ExitCode.REQUEUE}


def test_ranks_that_have_ended_are_named_at_once():
    """Rank 0 looks for all others, and they look for rank 0, which ends of that."""

    def work(rank: int, waiting: Waiting) -> float:
        if rank != 1:
            with pytest.raises(RankLost, match="^rank 1 .*has ended" if rank == 0 else "^rank 0 .*has ended"):
                waiting.for_all()
        return 0.0

    started = time.monotonic()
    on_all_ranks(work, timeout_s=4.0)  # a heartbeat comes four times as often
    assert time.monotonic() - started < 3.5


def test_a_rank_may_end_while_others_come_from_a_wait():
    def work(rank: int, waiting: Waiting) -> float:
        time.sleep(0.0 if rank == 0 else TIMEOUT_S)
        waiting.for_rank(0)
        return 0.0

    on_all_ranks(work)


def test_an_error_of_one_rank_alone_is_that_of_all():
    def work(rank: int, waiting: Waiting) -> float:
        if rank == 1:
            assert waiting.explain(NoRolloutCapacity("no server is left")) is None
            return 0.0
        with pytest.raises(RankLost, match="^rank 1 on .* failed in phase .*: no server is left$") as error:
            waiting.for_all()
        assert error.value.exit_code == ExitCode.NO_ROLLOUT_CAPACITY
        return 0.0

    on_all_ranks(work, timeout_s=20.0)


def test_nobody_waits_to_tell_others_of_an_error_that_all_have():
    def work(rank: int, waiting: Waiting) -> float:
        started = time.monotonic()
        assert waiting.explain(SaveFailed("the disk is full")) is None
        return time.monotonic() - started

    assert max(on_all_ranks(work, timeout_s=20.0)) < TELL_S


def lose_rank_two(waiting: Waiting) -> None:
    """As one that is killed, or stopped: no more heartbeats, and no last word."""
    waiting.heartbeats._stopped.set()
    waiting.heartbeats._thread.join()


def test_a_rank_that_was_killed_is_named_to_those_that_lost_it(monkeypatch):
    monkeypatch.setattr("megatron_r1.parallel.waiting.ANSWER_S", 1.5)
    done = threading.Barrier(RANKS)

    def work(rank: int, waiting: Waiting) -> float:
        if rank == 2:
            time.sleep(0.5)
            lose_rank_two(waiting)
        else:
            time.sleep(1.0)
            cause = waiting.explain(RuntimeError("[gloo] Connection closed by peer"))
            killed = "^rank 2 on .* ended without an error of its own, .*; the last heartbeat was in phase "
            assert isinstance(cause, RankLost) and re.match(killed, str(cause))
            assert cause.exit_code == ExitCode.REQUEUE
        done.wait(20)
        return 0.0

    on_all_ranks(work, timeout_s=20.0)


def test_after_a_signal_a_waiting_rank_makes_sure_that_others_live(monkeypatch):
    """It waits on for those that do, and no longer for one that does not."""
    monkeypatch.setattr("megatron_r1.parallel.waiting.PATIENCE_S", 1.5)
    done = threading.Barrier(RANKS)

    def work(rank: int, waiting: Waiting) -> float:
        if rank == 2:
            note_signal()
            time.sleep(2.5)
            waiting.for_rank(2)
            lose_rank_two(waiting)
            note_signal()
        else:
            waiting.for_rank(2)
            with pytest.raises(RankLost, match="^rank 2 on .* gave no sign of life for . s after a signal; the last"):
                waiting.for_rank(2)
        done.wait(20)
        return 0.0

    on_all_ranks(work, timeout_s=20.0)


def test_two_ranks_on_one_gpu_are_refused():
    store = dist.HashStore()
    claim_device(store, 0, "GPU-a")
    claim_device(store, 1, "GPU-b")
    claim_device(store, 1, "GPU-b")
    with pytest.raises(PlatformError, match="ranks 1 and 2 are both on GPU GPU-b: each needs one of its own"):
        claim_device(store, 2, "GPU-b")


JOB = """
import datetime, json, sys, time
from megatron_r1.config.parallel import ParallelConfig
from megatron_r1.platform import select
platform = select("cpu")
from megatron_r1.parallel import comm
from megatron_r1.parallel.mesh import process_groups
import torch.distributed as dist
with process_groups(platform, ParallelConfig(), 0, 1):
    rank = dist.get_rank()
    dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=2.5))
    if rank == 0:
        time.sleep(4)
    found = [comm.broadcast(f"rollout of rank {rank}")]
    if rank == 1:
        time.sleep(4)
    found.append(comm.all_gather_object(rank))
open(f"{sys.argv[1]}/{rank}.json", "w").write(json.dumps(found))
"""


@pytest.mark.dist
def test_a_rank_may_work_longer_than_a_collective_operation_may_take(tmp_path):
    """Two gloo ranks whose collective operations fail after 2.5 s; each works 4 s while the other waits."""
    (tmp_path / "job.py").write_text(JOB)
    run_forked_to_the_end(tmp_path / "job.py", tmp_path, ranks=2)
    for rank in (0, 1):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == ["rollout of rank 0", [0, 1]]
