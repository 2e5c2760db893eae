"""Ranks wait for one another outside of collective operations, as long as the other lives; here ranks are threads."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from megatron_r1.errors import ExitCode, PlatformError, RankLost
from megatron_r1.parallel.mesh import claim_device
from megatron_r1.parallel.waiting import Waiting

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
    from tests.support.launching import run_to_the_end

    (tmp_path / "job.py").write_text(JOB)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    run_to_the_end([*launcher, str(tmp_path / "job.py"), str(tmp_path)], seconds=100)
    for rank in (0, 1):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == ["rollout of rank 0", [0, 1]]
