"""Weights over a process group into two real servers: the same as from disk, in every way of cutting, and failures."""

import asyncio
import os
import signal
import time

import psutil
import pytest
import torch
from torch.distributed import distributed_c10d as c10d

from megatron_r1.config.model import ModelConfig
from megatron_r1.config.sglang import SGLangConfig
from megatron_r1.errors import DataError, NoRolloutCapacity
from megatron_r1.model.build import native_tensors
from megatron_r1.rollout.engine import Request, Sampling
from megatron_r1.rollout.sglang.engine import SGLangEngine
from megatron_r1.rollout.sglang.pause import PAUSES
from megatron_r1.rollout.sync.buckets import NamedTensor
from megatron_r1.rollout.sync.group_sender import GroupSender, SingleSender
from megatron_r1.rollout.sync.payload import FusedGroups, WeightPayload
from megatron_r1.rollout.sync.strategies import DiskSync, GroupSync
from tests.support.attached import generate_raw

pytestmark = [pytest.mark.sglang]
SHAPE = ModelConfig(init_std=0.08, max_sequence_length=1024)
ASKED = [Request("a", (5, 6, 7)), Request("b", (8, 9))]
SAMPLING = Sampling(1.0, 1.0, 4, (), 0)
TIMEOUT_S = 30.0
MIB = 1 << 20


@pytest.fixture(scope="module")
def model(new_model):
    return new_model(SHAPE)


@pytest.fixture(scope="module")
def disk(model, tmp_path_factory):
    from megatron_r1.config.data import DataConfig
    from megatron_r1.data.synthetic.train_tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(DataConfig(num_documents=2000)).save(folder)
    # Its folders hold the multi-token layers, which groups below leave out: servers without drafts serve the same.
    with DiskSync(lambda: native_tensors(model), SHAPE, folder, WeightPayload(SHAPE, include_mtp=True)) as disk:
        yield disk


@pytest.fixture(scope="module")
def engine(disk, tmp_path_factory):
    config = SGLangConfig(servers=2, max_running_requests=16, max_total_tokens=4096, request_timeout_s=TIMEOUT_S)
    logs = tmp_path_factory.mktemp("logs")
    with SGLangEngine(
        disk.write(), config, logs, "cpu", "float32", context_length=SHAPE.max_sequence_length, delta=True
    ) as engine:
        disk.engine = engine
        yield engine


@pytest.fixture(scope="module")
def sender(engine):
    with GroupSender(engine.endpoints, "trainer", timeout_s=TIMEOUT_S) as sender:
        yield sender


@pytest.fixture
def change(model):
    """Gives every weight new values."""
    noise = torch.Generator().manual_seed(int(time.monotonic_ns() % (1 << 30)))

    @torch.no_grad()
    def change() -> None:
        for _, tensor in native_tensors(model):
            tensor.add_(torch.randn(tensor.shape, generator=noise) * 0.02)

    return change


@torch.no_grad()
def change_some(model, seed: int) -> None:
    """Gives one number in fifty of every other weight a new value."""
    draw = torch.Generator().manual_seed(seed)
    for number, (_, tensor) in enumerate(native_tensors(model)):
        if number % 2 == seed % 2:
            tensor[torch.rand(tensor.shape, generator=draw) < 0.02] += 0.125


def weights(model) -> list[NamedTensor]:
    return list(WeightPayload(SHAPE).tensors(native_tensors(model), complete=True))


def whole(tensors: list[NamedTensor]) -> list[list[NamedTensor]]:
    """What belongs together, together."""
    return list(FusedGroups(one.name for one in tensors).collect(tensors))


def apart(tensors: list[NamedTensor]) -> list[list[NamedTensor]]:
    return [[one] for one in tensors]


def group_sync(engine, sender, model, bucket_bytes=64 * MIB, flush_cache=True, include_mtp=False) -> GroupSync:
    payload = WeightPayload(SHAPE, include_mtp)
    return GroupSync(engine, sender, lambda: native_tensors(model), payload, bucket_bytes, flush_cache)


def sent_by(sender: GroupSender, sync: GroupSync, version: str) -> int:
    """Bytes that a push sends to each server."""
    before = sender.sent_bytes
    sync.push(version)
    return sender.sent_bytes - before


def answers(engine) -> set[str]:
    return {one.weight_version for one in engine.generate(ASKED, SAMPLING)}


@pytest.mark.parametrize("bucket_bytes", [1, 100_000, 64 * MIB])
def test_group_and_disk_bring_the_same_weights(engine, sender, disk, model, change, bucket_bytes):
    before = engine.checksums()
    change()
    group_sync(engine, sender, model, bucket_bytes).push(f"group-{bucket_bytes}")
    assert answers(engine) == {f"group-{bucket_bytes}"}
    by_group = engine.checksums()
    assert all(by_group[name] != before[name] for name in before), "a weight was not replaced"
    assert any(name.endswith("e_score_correction_bias") for name in by_group)
    disk.push("disk")
    assert engine.checksums() == by_group
    assert answers(engine) == {"disk"}


@pytest.mark.parametrize("bucket_bytes", [100_000, 64 * MIB])
def test_deltas_bring_what_a_full_sync_brings(engine, sender, model, change, bucket_bytes):
    with GroupSender(engine.endpoints, "deltas", timeout_s=TIMEOUT_S, delta=True) as deltas:
        sync = group_sync(engine, deltas, model, bucket_bytes)
        change()
        whole = sent_by(deltas, sync, "whole")
        assert whole == sum(one.nbytes for one in weights(model))
        for seed in range(4):
            change_some(model, seed)
            assert 0 < sent_by(deltas, sync, f"delta-{seed}") < whole / 10
            assert answers(engine) == {f"delta-{seed}"}
        by_deltas = engine.checksums()
        group_sync(engine, sender, model, bucket_bytes).push("full")
        assert engine.checksums() == by_deltas
        assert sent_by(deltas, sync, "nothing") < whole / 1000
        assert engine.checksums() == by_deltas and answers(engine) == {"nothing"}


def test_a_failed_delta_is_followed_by_a_full_sync(engine, sender, model):
    with GroupSender(engine.endpoints, "failing", timeout_s=TIMEOUT_S, delta=True) as deltas:
        sync = group_sync(engine, deltas, model, 100_000)
        size = sent_by(deltas, sync, "whole")
        change_some(model, 1)

        def interrupted():
            yield from whole(weights(model))[:9]
            raise DataError("the weights ended")

        with pytest.raises(DataError, match="ended"), engine.receiving("interrupted"):
            deltas.send(interrupted(), 100_000, version="interrupted")
        assert sent_by(deltas, sync, "again") == size
        change_some(model, 2)
        assert sent_by(deltas, sync, "delta") < size / 10
        by_deltas = engine.checksums()
    group_sync(engine, sender, model).push("full")
    assert engine.checksums() == by_deltas


def test_a_server_loses_weights_that_are_no_longer_joined(engine, sender, model, change):
    """What fused.py says of SGLang: half of a pair is dropped in silence, other joined weights find their places."""
    before = engine.checksums()
    change()
    with engine.receiving("apart"):
        sender.send(apart(weights(model)), 1, version="apart")
    by_halves = engine.checksums()
    group_sync(engine, sender, model, 1).push("together")
    by_pairs = engine.checksums()
    stale = {name for name in by_pairs if by_halves[name] != by_pairs[name]}
    assert stale == {name for name in by_pairs if "fused_qkv_a_proj_with_mqa" in name}
    assert len(stale) == SHAPE.num_layers and all(by_halves[name] == before[name] for name in stale)
    assert any("gate_up_proj" in name for name in by_pairs)


def test_servers_without_drafts_let_multi_token_layers_pass(engine, sender, model, change):
    change()
    group_sync(engine, sender, model).push("without")
    without = engine.checksums()
    change()
    group_sync(engine, sender, model, 100_000, include_mtp=True).push("with")
    with_mtp = engine.checksums()
    assert with_mtp.keys() == without.keys() and all(with_mtp[name] != without[name] for name in without)
    group_sync(engine, sender, model).push("without")
    assert engine.checksums() == with_mtp


@pytest.mark.parametrize("name", sorted(PAUSES))
def test_running_requests_when_weights_change(engine, sender, model, change, name, monkeypatch):
    """A long answer at each server, asked for past the engine."""
    monkeypatch.setattr(engine, "pause", PAUSES[name])
    change()
    group_sync(engine, sender, model).push("old")
    tokens = 300  # some seconds: no server is done before the new weights come
    body = {"input_ids": [7, 8, 9], "sampling_params": {"max_new_tokens": tokens, "ignore_eos": True}}

    async def meanwhile() -> list[dict]:
        started = [asyncio.Event() for _ in engine.endpoints]
        answers = [
            asyncio.ensure_future(generate_raw(endpoint, body, event))
            for endpoint, event in zip(engine.endpoints, started, strict=True)
        ]
        await asyncio.gather(*(event.wait() for event in started))
        push = group_sync(engine, sender, model, flush_cache=PAUSES[name].flush_cache).push
        await asyncio.to_thread(push, f"new-{name}")
        return [(await answer)["meta_info"] for answer in answers]

    for seen in asyncio.run(meanwhile()):
        versions = [span["version"] for span in seen["weight_versions"]]
        if name == "finish":
            assert versions == ["old"] and seen["completion_tokens"] == tokens
        elif name == "abort":
            assert seen["finish_reason"]["type"] == "abort" and seen["completion_tokens"] < tokens
        else:
            assert versions == ["old", f"new-{name}"] and seen["completion_tokens"] == tokens
    assert answers(engine) == {f"new-{name}"}


def test_two_senders_share_a_session(engine, sender, model, change):
    change()
    everything = weights(model)
    cut = next(place for place, one in enumerate(everything) if one.name.startswith("model.layers.1."))
    with GroupSender(engine.endpoints, "stage-1", timeout_s=TIMEOUT_S) as second, engine.receiving("two"):
        assert sender.send(whole(everything[:cut]), 50_000, version="two", order=SingleSender(ends_session=False)) > 1
        second.send(whole(everything[cut:]), 50_000, version="two")
    assert engine.version == "two"
    assert answers(engine) == {"two"}
    by_two = engine.checksums()
    group_sync(engine, sender, model).push("one")
    assert engine.checksums() == by_two


def test_a_session_without_a_stamp_is_refused(engine, sender, model):
    with pytest.raises(NoRolloutCapacity, match="after an update to 'unstamped'"), engine.receiving("unstamped"):
        sender.send(whole(weights(model)), MIB, version="unstamped", order=SingleSender(ends_session=False))
    assert engine.version != "unstamped"
    group_sync(engine, sender, model).push("stamped")
    assert answers(engine) == {"stamped"}


def test_wrong_shape_is_reported_in_time_and_fixed_by_the_next_update(engine, sender, model):
    version, began = engine.version, time.monotonic()
    wrong = [
        NamedTensor(one.name, one.tensor[:-1] if one.name == "lm_head.weight" else one.tensor) for one in weights(model)
    ]
    told = r"sender trainer, bucket \d+ \(.*lm_head"
    with pytest.raises(NoRolloutCapacity, match=told) as error, engine.receiving("wrong"):
        sender.send(whole(wrong), 100_000, version="wrong")
    assert "\n" not in str(error.value)
    assert engine.endpoints[0].url in str(error.value) or engine.endpoints[1].url in str(error.value)
    assert time.monotonic() - began < 20
    assert engine.version == version
    with pytest.raises(NoRolloutCapacity, match="the update to 'wrong' was not completed"):
        engine.generate(ASKED, SAMPLING)
    group_sync(engine, sender, model).push("mended")
    assert answers(engine) == {"mended"}


def test_weights_of_another_model_are_refused_and_mended(engine, sender, disk, model):
    some = list(native_tensors(model))[1:]
    with pytest.raises(DataError, match="missing"):
        GroupSync(engine, sender, lambda: some, WeightPayload(SHAPE), MIB).push("incomplete")
    with pytest.raises(NoRolloutCapacity, match="incomplete"):
        engine.generate(ASKED, SAMPLING)
    disk.push("from-disk")
    assert answers(engine) == {"from-disk"}


def test_a_server_that_does_not_join_the_broadcast_ends_it(engine, model):
    """A server that has no session refuses at once, while the sender is in a broadcast that nobody receives."""
    began = time.monotonic()
    early = GroupSender(engine.endpoints, "early", timeout_s=TIMEOUT_S)
    with pytest.raises(NoRolloutCapacity, match="must run between"), early:
        early.send(whole(weights(model)), MIB, version="early")
    assert time.monotonic() - began < 20


def test_close_leaves_nothing(engine, model):
    def held() -> tuple[int, int, int]:
        process = psutil.Process()
        sockets = [one for one in process.net_connections() if one.status in ("ESTABLISHED", "LISTEN")]
        return len(sockets), len(c10d._world.pg_map), len(c10d._world.pg_names)

    before = held()
    with GroupSender(engine.endpoints, "short", timeout_s=TIMEOUT_S) as short:
        group_sync(engine, short, model).push("short")
        assert held() > before
    assert held() == before
    short.close()
    assert answers(engine) == {"short"}


def test_a_server_killed_in_the_middle_is_named_in_time_and_back_with_the_next_update(engine, sender, model, change):
    began, version = time.monotonic(), engine.version

    def interrupted():
        for number, unit in enumerate(whole(weights(model))):
            if number == 20:
                os.killpg(engine.servers[1].process.pid, signal.SIGKILL)
            yield unit

    with pytest.raises(NoRolloutCapacity, match="ended with status -9"), engine.receiving("killed"):
        sender.send(interrupted(), 1, version="killed")
    assert time.monotonic() - began < 25
    assert engine.version == version
    change()
    sync = group_sync(engine, sender, model)
    sync.push("next")
    assert answers(engine) == {"next"} and engine.restarts == 1
    engine.checksums()  # are the same on both


def test_a_restarted_server_gets_a_full_sync_where_others_would_get_a_delta(engine, model, change):
    with GroupSender(engine.endpoints, "restarted", timeout_s=TIMEOUT_S, delta=True) as deltas:
        sync = group_sync(engine, deltas, model)
        change()
        whole = sent_by(deltas, sync, "whole")
        restarts = engine.restarts
        os.killpg(engine.servers[1].process.pid, signal.SIGKILL)
        assert wait_for(lambda: engine.restarts > restarts and "waits for the next update" in engine.states()[1])
        change_some(model, 3)
        assert sent_by(deltas, sync, "restarted") == whole
        change_some(model, 4)
        assert sent_by(deltas, sync, "delta") < whole / 10
        engine.checksums()  # are the same on both
        assert answers(engine) == {"delta"}


def test_a_server_that_lost_its_weights_is_left_out_until_the_next_update(engine, sender, model, change):
    sync = group_sync(engine, sender, model)
    sync.push("before")
    restarts = engine.restarts
    os.killpg(engine.servers[0].process.pid, signal.SIGKILL)
    assert answers(engine) == {"before"}  # by the other one
    assert wait_for(lambda: engine.restarts > restarts and "waits for the next update" in engine.states()[0])
    assert answers(engine) == {"before"}
    change()
    sync.push("after")
    engine.checksums()
    assert engine.states() == ["", ""] and answers(engine) == {"after"}


def test_servers_that_all_lost_their_weights_are_no_capacity(engine):
    for server in engine.servers:
        os.killpg(server.process.pid, signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(NoRolloutCapacity, match="no server has the current weights any more: .*status -9"):
        engine.generate(ASKED, SAMPLING)
    assert time.monotonic() - began < 10


def wait_for(condition, seconds: float = 60.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
