"""The pool's client is fast enough for many servers, and holds no more after ten minutes than after one."""

from __future__ import annotations

import asyncio
import importlib.util
import statistics
from pathlib import Path
from types import ModuleType

import psutil
import pytest

from tests.support.fake_sglang import KEY, fakes

REQUESTS_PER_SECOND = 1500
PROGRAM = Path(__file__).parents[2] / "tools" / "bench" / "rollout_client.py"


@pytest.fixture(scope="module")
def program() -> ModuleType:
    spec = importlib.util.spec_from_file_location("rollout_client", PROGRAM)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_requests_a_second(program):
    with fakes(1) as running:
        found = asyncio.run(program.rates([running[0].url], KEY, in_flight=256, count=2000, rounds=4))
        user, system, *_ = psutil.Process(running[0].process.pid).cpu_times()
    print([f"{rate.clock:.0f} by the clock, {rate.core:.0f} a second of a core" for rate in found])
    # With a core for the client and one for the server, each of them alone would be this fast.
    assert max(rate.core for rate in found) >= REQUESTS_PER_SECOND
    assert 8000 / (user + system) >= REQUESTS_PER_SECOND


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ten_minutes_at_256_in_flight(program):
    with fakes(2, seconds=0.4) as running:
        looks = asyncio.run(program.soak([one.url for one in running], KEY, in_flight=256, seconds=600.0))
    settled = [look for look in looks if look.seconds >= 60]
    minutes = [look.seconds / 60 for look in settled]
    slope = statistics.linear_regression(minutes, [look.memory / 1e6 for look in settled]).slope
    descriptors = [look.descriptors for look in looks]
    print(
        f"{looks[-1].requests} requests; {slope:+.2f} MB a minute; descriptors {min(descriptors)}..{max(descriptors)}"
    )
    assert abs(slope) < 1.0
    assert max(look.descriptors for look in settled) <= 256 + 64
    assert settled[-1].descriptors <= settled[0].descriptors + 8
