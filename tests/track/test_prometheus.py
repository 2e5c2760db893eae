"""What Prometheus gets from a run that trains."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from megatron_r1.errors import ConfigError
from megatron_r1.track.prometheus import MetricsEndpoint

ROW = {
    "train/loss": 2.5,
    "train/gradient_norm": float("nan"),
    "perf/phase_seconds/update": 1.5,
    "perf/phase_seconds/save": 0.25,
    "rollout/requests_failed": 3,
    "moe/load_max": 1.25,
}


@pytest.fixture
def endpoint() -> Iterator[MetricsEndpoint]:
    served = MetricsEndpoint("127.0.0.1", 0, "tiny", lambda: ("rollout", 8, 12.5))
    yield served
    served.close()


def fetched(endpoint: MetricsEndpoint) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{endpoint.port}/metrics", timeout=20) as reply:
        text = reply.read().decode()
    samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
    return {(sample.name, frozenset(sample.labels.items())): sample.value for sample in samples}


def labels(**more: str) -> frozenset[tuple[str, str]]:
    return frozenset({"run": "tiny", **more}.items())


def test_the_newest_row_is_served_by_name(endpoint):
    endpoint.update({"train/loss": 9.0})
    endpoint.update(ROW)
    assert fetched(endpoint) == {
        ("megatron_r1_step", labels()): 8,
        ("megatron_r1_seconds_in_phase", labels(phase="rollout")): 12.5,
        ("megatron_r1_train_loss", labels()): 2.5,
        ("megatron_r1_perf_phase_seconds", labels(name="update")): 1.5,
        ("megatron_r1_perf_phase_seconds", labels(name="save")): 0.25,
        ("megatron_r1_rollout_requests_failed", labels()): 3,
        ("megatron_r1_moe_load_max", labels()): 1.25,
    }


def test_before_the_first_step_it_says_what_the_run_does(endpoint):
    assert {name for name, _ in fetched(endpoint)} == {"megatron_r1_step", "megatron_r1_seconds_in_phase"}


def test_a_port_in_use_is_refused_in_one_line(endpoint):
    with pytest.raises(ConfigError, match=f"track.prometheus_port={endpoint.port}: cannot listen at 127.0.0.1: "):
        MetricsEndpoint("127.0.0.1", endpoint.port, "other", lambda: ("start", 0, 0.0))
