"""Stops before a preemption: a signal of the scheduler, or its clock, ends the run after the current step, with a
checkpoint.
"""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

from megatron_r1 import stop_signal
from megatron_r1.parallel.waiting import note_signal
from megatron_r1.train.hooks import Hook

SIGNALS = (signal.SIGTERM, stop_signal.SIGNAL, signal.SIGINT)
JOB_ENDS = ("MEGATRON_R1_JOB_ENDS", "SLURM_JOB_END_TIME")
"""Environment variables, the first that is set counts: when the scheduler ends the job, in seconds since 1970."""


class PreemptHook(Hook):
    """Notes a signal, for which the loop checks after every step, as for the time. A second Ctrl-C interrupts at once.

    Args:
        save_before_limit_s: seconds before the end of the job at which to stop; 0 does not look at the clock.
    """

    def __init__(self, save_before_limit_s: float = 0.0) -> None:
        self.received: signal.Signals | None = None
        self._stop_at = job_ends() - save_before_limit_s if save_before_limit_s else float("inf")
        stop_signal.block()
        for number in SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, _: FrameType | None) -> None:
        # A handler that does more than set flags could interrupt a half-done write.
        self.received = signal.Signals(number)
        note_signal()
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def stop_requested(self) -> bool:
        if stop_signal.received():
            self.received = stop_signal.SIGNAL
        return self.received is not None or time.time() >= self._stop_at

    @property
    def reason(self) -> str:
        """Why the run stopped, for a message; on a rank without a signal it was another rank's."""
        if self.received:
            return self.received.name
        return "the time limit of the job is near" if self.stop_requested() else "a signal"


def job_ends() -> float:
    """When the scheduler ends this job, in seconds since 1970; infinite without one."""
    written = next((os.environ[name] for name in JOB_ENDS if os.environ.get(name)), "inf")
    return float(written)
