"""What forward and backward passes take, by the places where megatron-core starts and stops its own timers.

A rank's own work is what tells a slow rank from one that waits for it. On a CPU it is the processor time of the thread,
which stands still while a collective operation waits. On CUDA it is the time on the GPU's stream; there what
tensor-parallel and expert-parallel ranks exchange within a pass counts too, so that the ranks of one such group differ
little. What pipeline stages send to one another counts on neither, nor do the reduction of gradients and the update.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.profiler import record_function

from megatron_r1.model.chunks import Model
from megatron_r1.parallel.phases import current
from megatron_r1.parallel.trace import recording

PASSES = {"forward-compute": "forward", "backward-compute": "backward"}
"""megatron-core's timers of passes -> their names in a trace; those of other timers are megatron-core's."""
MOST_EVENTS = 4096
"""Passes whose events are kept, in a process that never takes their seconds too."""


class PassWork(Protocol):
    """A rank's own work in passes."""

    def begin(self) -> None: ...

    def end(self) -> None: ...

    def take_seconds(self) -> dict[str, float]:
        """Seconds of passes since the last call, by the phase that they were in."""
        ...


class ProcessorWork:
    """On a CPU: processor time of the thread that runs the passes."""

    def __init__(self) -> None:
        self._since = 0.0
        self._seconds: dict[str, float] = {}

    def begin(self) -> None:
        self._since = time.thread_time()

    def end(self) -> None:
        phase = current().phase
        self._seconds[phase] = self._seconds.get(phase, 0.0) + time.thread_time() - self._since

    def take_seconds(self) -> dict[str, float]:
        seconds, self._seconds = self._seconds, {}
        return seconds


class DeviceWork:
    """On CUDA: time between two events of the current stream."""

    def __init__(self) -> None:
        self._since: Any = None
        self._passes: list[tuple[str, Any, Any]] = []
        self._seconds: dict[str, float] = {}

    def begin(self) -> None:
        self._since = _event()

    def end(self) -> None:
        self._passes.append((current().phase, self._since, _event()))
        if len(self._passes) > MOST_EVENTS:
            self._add_up(MOST_EVENTS // 2)  # which ended long ago

    def take_seconds(self) -> dict[str, float]:
        self._add_up(len(self._passes))
        seconds, self._seconds = self._seconds, {}
        return seconds

    def _add_up(self, passes: int) -> None:
        """Add up the first so many passes, and wait for the last of them."""
        for phase, begin, end in self._passes[:passes]:
            end.synchronize()
            self._seconds[phase] = self._seconds.get(phase, 0.0) + begin.elapsed_time(end) / 1000
        del self._passes[:passes]


def _event() -> Any:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


WORK: dict[str, PassWork] = {"cpu": ProcessorWork(), "cuda": DeviceWork()}
"""Type of a device -> the work of this process on it."""


@dataclass(frozen=True)
class _Timer:
    name: str
    work: PassWork | None
    """For a timer of a pass."""
    ranges: list[record_function] | None
    """While a profiler records: the ranges of the trace that are open, innermost last."""

    def start(self, barrier: bool = False) -> None:
        if self.ranges is not None:
            self.ranges.append(record_function(self.name))
            self.ranges[-1].__enter__()
        if self.work:
            self.work.begin()

    def stop(self, barrier: bool = False) -> None:
        if self.work:
            self.work.end()
        if self.ranges:
            self.ranges.pop().__exit__(None, None, None)


class PassTimers:
    """megatron-core's `timers`: `timers(name).start()` and `stop()`. None waits for other ranks."""

    def __init__(self, work: PassWork, traced: bool):
        self._work = work
        self._ranges: dict[str, list[record_function]] | None = {} if traced else None

    def __call__(self, name: str, log_level: int | None = None) -> _Timer:
        ranges = None if self._ranges is None else self._ranges.setdefault(name, [])
        return _Timer(PASSES.get(name, name), self._work if name in PASSES else None, ranges)


def pass_timers(model: Model) -> PassTimers:
    """Timers for the passes of a model, which begin now."""
    return PassTimers(WORK[next(model.parameters()).device.type], recording())


def take_work_seconds(device: str) -> dict[str, float]:
    """Seconds of this rank's own work in passes since the last call, by phase.

    Args:
        device: torch's name of the device of the models.
    """
    return WORK[device.partition(":")[0]].take_seconds()
