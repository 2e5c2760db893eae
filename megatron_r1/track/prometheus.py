"""The newest metrics of a run in Prometheus' text format, at http://HOST:PORT/metrics.

An endpoint and not a file for node_exporter: it needs nothing else on the node, a run that has ended answers no more,
and what the rank does right now is read when Prometheus asks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from megatron_r1.errors import ConfigError
from megatron_r1.track import metrics

PREFIX = "megatron_r1_"


class MetricsEndpoint(Collector):
    """Serves the last row that it was given, from a thread of its own."""

    def __init__(self, host: str, port: int, run: str, now: Callable[[], tuple[str, int, float]]):
        """
        Args:
            host: address to listen at.
            run: name of the run; a label of every metric.
            now: phase of the process, step under way, and seconds for which it is in that phase.

        Raises:
            ConfigError: the port is in use, or not allowed.
        """
        self._run, self._now = run, now
        self._row: Mapping[str, Any] = {}
        registry = CollectorRegistry()
        registry.register(self)
        try:
            self._server, _ = start_http_server(port, host, registry)
        except OSError as error:
            raise ConfigError("track.prometheus_port", port, f"cannot listen at {host}: {error.strerror}") from error

    @property
    def port(self) -> int:
        """Port that it listens at."""
        return int(self._server.server_port)

    def update(self, row: Mapping[str, Any]) -> None:
        """Serve this row from now on."""
        self._row = row

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """The step and phase under way, then the row's numbers; of families such as times by phase, by their name."""
        phase, step, seconds = self._now()
        yield _gauge("step", "Step under way.", {(self._run,): step})
        yield _gauge(
            "seconds_in_phase", "Seconds for which rank 0 is in its phase.", {(self._run, phase): seconds}, "phase"
        )
        families: dict[str, dict[tuple[str, ...], float]] = {}
        for name, value in self._row.items():
            metric = metrics.find(name)
            if isinstance(value, int | float) and not math.isnan(value):
                labels = (self._run, *([name[len(metric.name) - 1 :]] if metric.name.endswith("/*") else []))
                families.setdefault(metric.name, {})[labels] = value
        for name, values in families.items():
            more = ("name",) if name.endswith("/*") else ()
            yield _gauge(name.removesuffix("/*"), metrics.find(name.replace("*", "x")).meaning, values, *more)


def _gauge(name: str, meaning: str, values: Mapping[tuple[str, ...], float], *labels: str) -> GaugeMetricFamily:
    family = GaugeMetricFamily(PREFIX + re.sub(r"\W", "_", name), meaning, labels=["run", *labels])
    for label_values, value in values.items():
        family.add_metric([*label_values], value)
    return family
