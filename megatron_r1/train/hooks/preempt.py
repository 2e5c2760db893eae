"""Stops before a preemption: a signal of the scheduler ends the run after the current step, with a checkpoint."""

from __future__ import annotations

import signal
from types import FrameType

from megatron_r1.train.hooks import Hook

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class PreemptHook(Hook):
    """Notes a signal, for which the loop checks after every step. A second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        for number in SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, _: FrameType | None) -> None:
        # A handler that does more than set a flag could interrupt a half-done write.
        self.received = signal.Signals(number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def stop_requested(self) -> bool:
        return self.received is not None
