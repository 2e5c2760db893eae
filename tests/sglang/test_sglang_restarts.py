"""Two real servers that are killed and stopped while they generate: every group completes, and they come back."""

import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from megatron_r1.config.sglang import PoolConfig, SGLangConfig
from megatron_r1.errors import NoRolloutCapacity
from megatron_r1.rollout.engine import Request, Sampling, require_completions
from megatron_r1.rollout.sglang.engine import SGLangEngine
from megatron_r1.rollout.sglang.servers.discovery import ADMIN_KEY, API_KEY
from megatron_r1.rollout.sglang.servers.leftovers import mapped_segments, named_segments
from megatron_r1.rollout.sglang.servers.process import group_members, new_endpoints
from tests.support.samples import prompt_of, tokens_of

pytestmark = [pytest.mark.sglang]
CONTEXT, VOCABULARY, GROUP = 64, 160, 4
FREE = Sampling(temperature=1.0, top_p=1.0, max_tokens=24, stop_tokens=(), seed=0)
POOL = PoolConfig(requests_per_call=GROUP, health_interval_s=0.5, hang_timeout_s=4.0, capacity_timeout_s=90.0)


@pytest.fixture(scope="module")
def engine(models, tmp_path_factory):
    config = SGLangConfig(servers=2, max_running_requests=16, max_total_tokens=4096, request_timeout_s=60.0, pool=POOL)
    logs = tmp_path_factory.mktemp("logs")
    with SGLangEngine(models[0][0], config, logs, "cpu", "float32", context_length=CONTEXT) as engine:
        yield engine


def requests(seed: int, prompts: int = 32) -> list[Request]:
    draw = random.Random(seed)
    tokens = [tuple(draw.randrange(3, VOCABULARY) for _ in range(draw.randrange(1, 40))) for _ in range(prompts)]
    return [Request(f"{prompt}-{i}", tokens[prompt]) for prompt in range(prompts) for i in range(GROUP)]


def check(asked: list[Request], outcomes, version: str) -> None:
    """Every request has one answer of its own, by the current weights."""
    completions = require_completions(outcomes)
    assert [one.request_id for one in completions] == [one.id for one in asked]
    assert [prompt_of(one) for one in completions] == [one.prompt_tokens for one in asked]
    assert {one.weight_version for one in completions} == {version}
    assert len({(prompt_of(one), tokens_of(one)) for one in completions}) > 0.9 * len(asked)


def wait_for(condition, seconds: float = 90.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def kill_while_it_generates(engine: SGLangEngine, place: int, seed: int, version: str) -> None:
    """Kill a server once it has answered something and has more to answer; it must be back afterwards."""
    process, restarts, (answered, _) = engine.servers[place].process, engine.restarts, engine.progress()[place]
    folder, killed = engine.servers[place].folder, []
    assert named_segments(folder)

    def kill() -> None:
        now, in_flight = engine.progress()[place]
        while not (now > answered and in_flight):
            time.sleep(0.002)
            now, in_flight = engine.progress()[place]
        killed.append(in_flight)
        process.kill() if seed % 2 else os.killpg(process.pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    asked = requests(seed)
    while not killed:  # all may be answered before the killer looks a second time
        check(asked, engine.generate(asked, FREE), version)
    killer.join()
    wait_for(lambda: engine.restarts == restarts + 1 and engine.states() == ["", ""])
    assert killed[0] > 0
    assert not folder.exists() and not named_segments(folder)
    assert engine.weight_versions()[place] == version
    engine.checksums()  # raises unless the two agree
    check(asked, engine.generate(asked, FREE), version)


def test_killed_while_it_generates(engine, models):
    engine.load_weights(models[0][1], "one")
    kill_while_it_generates(engine, 1, seed=1, version="one")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_ten_times(engine, models):
    for number in range(10):
        engine.load_weights(models[0][number % 10], f"v{number}")
        kill_while_it_generates(engine, number % 2, seed=10 + number, version=f"v{number}")


def scheduler_of(engine: SGLangEngine, place: int) -> psutil.Process:
    (found,) = [
        process
        for process in map(psutil.Process, group_members(engine.servers[place].process.pid))
        if "scheduler" in " ".join(process.cmdline())
    ]
    return found


def test_a_stopped_scheduler_is_detected_behind_a_front_end_that_answers(engine, models, caplog):
    engine.load_weights(models[0][2], "two")
    restarts = engine.restarts
    scheduler_of(engine, 0).suspend()
    asked = requests(2)
    with caplog.at_level(logging.ERROR):
        check(asked, engine.generate(asked, FREE), "two")
        wait_for(lambda: engine.restarts == restarts + 1 and engine.states() == ["", ""])
    assert "no progress for" in caplog.text
    # Its weights are those that came while it ran, not those that it was first started with.
    assert engine.weight_versions()[0] == "two"
    engine.checksums()


def test_servers_by_address_and_behind_a_router(engine, models, tmp_path, monkeypatch):
    endpoint = engine.endpoints[0]
    monkeypatch.setenv(API_KEY, endpoint.api_key)
    monkeypatch.setenv(ADMIN_KEY, endpoint.admin_key)
    router, metrics = (one.url for one in new_endpoints(2))
    command = [sys.executable, "-m", "sglang_router.launch_router", "--host", "127.0.0.1"]
    command += ["--port", router.rpartition(":")[2], "--prometheus-port", metrics.rpartition(":")[2]]
    config = SGLangConfig(
        addresses=[one.url for one in engine.endpoints], router=router, request_timeout_s=60.0, pool=POOL
    )
    asked = requests(3, prompts=8)
    with open(tmp_path / "router.log", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        wait_for(lambda: b"starting server" in (tmp_path / "router.log").read_bytes().lower(), 30)
        with SGLangEngine(models[0][3], config, tmp_path, "cpu", "float32", context_length=CONTEXT) as outer:
            check(asked, outer.generate(asked, FREE), "initial")
            outer.load_weights(models[0][4], "routed")
            check(asked, outer.generate(asked, FREE), "routed")
            assert outer.health()["resent"] == 0
            assert outer.servers == []
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert engine.checksums() and engine.weight_versions()[0] == "routed"
    written = b"".join(path.read_bytes() for path in Path(tmp_path).iterdir() if path.is_file())
    assert written and endpoint.api_key.encode() not in written and endpoint.admin_key.encode() not in written


def test_end_leaves_nothing(engine):
    families = [group_members(server.process.pid) for server in engine.servers]
    assert all(len(family) >= 3 for family in families)
    folders = [server.folder for server in engine.servers]
    segments = set().union(*(mapped_segments(server.process.pid) for server in engine.servers))
    engine.close()
    assert not any(group_members(family[0]) for family in families)
    assert not any(folder.exists() for folder in folders)
    assert segments and not any(segment.exists() for segment in segments)
    with pytest.raises(NoRolloutCapacity):
        engine.generate(requests(4, prompts=1), FREE)
