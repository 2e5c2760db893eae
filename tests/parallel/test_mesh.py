"""Process groups of one and of two ranks, and what ranks agree on."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from megatron_r1.config.cross_checks import check_degrees, check_layout
from megatron_r1.config.parallel import ParallelConfig
from megatron_r1.config.run import RunConfig
from megatron_r1.errors import ConfigError
from megatron_r1.parallel import mesh
from megatron_r1.parallel.comm import (
    AllRanks,
    all_gather_object,
    all_ranks,
    any_rank,
    broadcast,
    max_over_ranks,
    sum_over_ranks,
)
from megatron_r1.parallel.mesh import data_parallel_group, tensor_parallel_group, usable_cores


@pytest.mark.parametrize(
    ("allowed", "threads", "cores", "expected"),
    [(2, 2, 2, 2), (2, 2, 1, 1), (1, 8, 4, 1), (12, 64, 32, 6), (3, 4, None, 3)],
)
def test_two_threads_of_one_core_count_as_one(monkeypatch, allowed, threads, cores, expected):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(allowed)))
    monkeypatch.setattr(mesh.psutil, "cpu_count", lambda logical=True: threads if logical else cores)
    assert usable_cores() == expected


@pytest.mark.parametrize(
    ("degrees", "ranks", "key"),
    [
        (ParallelConfig(tensor=2), 1, "parallel.tensor"),
        (ParallelConfig(tensor=2, pipeline=2), 6, "parallel.tensor"),
        (ParallelConfig(expert=4), 2, "parallel.expert"),
        (ParallelConfig(tensor=2, expert=2, expert_tensor=2), 2, "parallel.expert"),
    ],
)
def test_degrees_that_do_not_divide_the_ranks_are_refused(degrees, ranks, key):
    with pytest.raises(ConfigError, match=f"{ranks} ranks") as refused:
        check_degrees(degrees, ranks)
    assert refused.value.key == key


def test_every_batch_of_a_ramp_must_be_shared_out_evenly():
    config = RunConfig()
    config.train.micro_batch_size, config.train.global_batch_size = 2, 16
    ramp = config.train.schedule.batch_ramp
    ramp.start, ramp.increment, ramp.tokens = 4, 4, 1000
    check_layout(config, "pretrain", 2)
    with pytest.raises(ConfigError, match=r"train.micro_batch_size=2: must divide the 3 sequences"):
        check_layout(config, "pretrain", 4)
    ramp.start, ramp.increment = 10, 2
    with pytest.raises(ConfigError, match=r"train.schedule.batch_ramp=10: must be a multiple of the 4") as refused:
        check_layout(config, "pretrain", 4)
    assert refused.value.key == "train.schedule.batch_ramp"


def test_degrees_that_divide_the_ranks_pass():
    check_degrees(ParallelConfig(tensor=2, pipeline=2), 8)
    check_degrees(ParallelConfig(expert=8), 8)
    check_degrees(ParallelConfig(tensor=2, expert=2), 4)


def test_one_rank_agrees_with_itself(one_rank):
    assert [any_rank(True), any_rank(False), all_ranks(True), all_ranks(False)] == [True, False, True, False]
    assert broadcast("value") == "value" and all_gather_object(3) == [3] and AllRanks().rank == 0
    assert sum_over_ranks("test", {"a": 0.1}) == max_over_ranks("test", {"a": 0.1}) == {"a": 0.1}
    assert str(max_over_ranks("test", {"a": float("nan")})) == "{'a': nan}"


def test_every_process_group_has_the_configured_timeout(one_rank):
    """`one_rank` asks for 45 minutes."""
    for group in (dist.group.WORLD, tensor_parallel_group(), data_parallel_group()):
        assert group._get_backend(torch.device("cpu")).options._timeout == timedelta(minutes=45)


def test_a_timeout_of_no_minutes_is_refused():
    with pytest.raises(ConfigError, match="distributed_timeout_minutes=0"):
        RunConfig(distributed_timeout_minutes=0)


def test_two_ranks_get_the_same_results(two_ranks):
    for found in two_ranks:
        assert found["comm"] == {
            "any": [True, False],
            "all": [False, True],
            "broadcast": {"from": 1},
            "gather": ["rank 0", "rank 1"],
            "numbers": [{"a": 3.0, "b": 0.2}, {"c": 2.0}, {"c": 3.0}, {"a": 1.0, "b": -0.5}],
            "nan": "{'a': nan, 'b': inf}",
        }
        assert found["tensor_parallel"] == 2 and found["threads"] == 1
