"""Names for what a trace of torch's profiler shows; they cost nothing while no profiler records."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.profiler import record_function


def recording() -> bool:
    """Whether a profiler of torch records now."""
    return torch.autograd.profiler._is_profiler_enabled


@contextmanager
def traced(name: str) -> Iterator[None]:
    """A range of this name in the trace."""
    if not recording():
        yield
        return
    with record_function(name):
        yield
