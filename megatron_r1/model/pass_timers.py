"""Names what megatron-core does in a pass, in a trace of torch's profiler."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.profiler import record_function

NAMES = {"forward-compute": "forward", "backward-compute": "backward"}
"""megatron-core's name of a timer -> name in the trace; others are as megatron-core has them: `all-grads-sync`,
`forward-recv`."""


@dataclass(frozen=True)
class _Range:
    name: str
    open: dict[str, list[record_function]]
    """Ranges that have begun, by name, innermost last."""

    def start(self, barrier: bool = False) -> None:
        entered = record_function(self.name)
        entered.__enter__()
        self.open.setdefault(self.name, []).append(entered)

    def stop(self, barrier: bool = False) -> None:
        self.open[self.name].pop().__exit__(None, None, None)


class PassTimers:
    """megatron-core's `timers`, as named ranges; no timer waits for other ranks."""

    def __init__(self) -> None:
        self._open: dict[str, list[record_function]] = {}

    def __call__(self, name: str, log_level: int | None = None) -> _Range:
        return _Range(NAMES.get(name, name), self._open)


def pass_timers() -> PassTimers | None:
    """For megatron-core's configuration: None unless a profiler records, so that passes cost nothing otherwise."""
    return PassTimers() if torch.autograd.profiler._is_profiler_enabled else None
