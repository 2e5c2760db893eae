"""Shows each row of metrics to Prometheus."""

from __future__ import annotations

import time
from typing import Any

from megatron_r1.config.jobs import TrackConfig
from megatron_r1.parallel import phases
from megatron_r1.track.prometheus import MetricsEndpoint
from megatron_r1.train.hooks import Hook
from megatron_r1.train.state import TrainState


class PrometheusHook(Hook):
    """Serves the newest row until the run ends."""

    def __init__(self, track: TrackConfig, run: str):
        self._endpoint = MetricsEndpoint(track.prometheus_host, track.prometheus_port, run, _now)

    def after_step(self, state: TrainState, row: dict[str, Any]) -> None:
        self._endpoint.update(dict(row))

    def finish(self, state: TrainState) -> None:
        self._endpoint.close()


def _now() -> tuple[str, int, float]:
    current = phases.current()
    return current.phase, current.step, time.monotonic() - current.since
