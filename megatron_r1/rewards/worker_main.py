"""What every worker process does around the function that judges: limits, an alarm, one JSON object a line."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

MEMORY_BYTES = 2 << 30


class TooLong(BaseException):
    """Not an Exception, so that no library catches it."""


def _alarm(signum: int, frame: FrameType | None) -> None:
    raise TooLong


def _spend_at_most(seconds: float) -> None:
    """From now on; the process ends by SIGXCPU when it goes over."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime + seconds) + 2, hard))


def serve(judge: Callable[[dict[str, Any]], bool], seconds: float) -> None:
    """Say `true`, then answer each line of standard input with the verdict on it, until there is no more.

    Loops of Python are stopped by an alarm after half the deadline, without losing the process; what no alarm stops is
    left to whoever waits, and ended by the limit on processor time where nobody does any more.
    """
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, _alarm)
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no verdict
    print("true", file=replies, flush=True)
    for line in sys.stdin:
        item, right = json.loads(line), False
        _spend_at_most(seconds)
        try:
            signal.setitimer(signal.ITIMER_REAL, seconds / 2)
            try:
                right = judge(item)
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        except (TooLong, Exception):  # an answer that a library cannot digest is no right one
            right = False
        print(json.dumps(bool(right)), file=replies, flush=True)
