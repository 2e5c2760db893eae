"""Starts the ranks of one job on this machine and returns its exit code.

torchrun starts ranks too, but exits with status 1 whatever the ranks' exit codes are; recipes act on these codes (85
requests a restart), so the ranks are started here.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import IO

from megatron_r1 import lifeline, stop_signal
from megatron_r1.platform.launcher import without_launcher
from megatron_r1.platform.ports import reserve_ports

GRACE_S = 10.0
"""Seconds between SIGTERM and SIGKILL for the ranks that still run when another one has failed."""
POLL_S = 0.05


class RankProcesses:
    """The processes of one job. When this process dies, they die too."""

    def __init__(self, command: Sequence[str], ranks: int, prefix: str = "", launched: bool = False):
        """Start them.

        Args:
            prefix: text before every line that the ranks print, which names the stage where several run side by side.
            launched: the one process takes this one's place among the ranks that a launcher has started.
        """
        common = (dict(os.environ) if launched else without_launcher(os.environ)) | lifeline.variables()
        if ranks > 1:
            common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(reserve_ports(1)[0]), "WORLD_SIZE": str(ranks)}
        pipe = subprocess.PIPE if prefix else None
        with stop_signal.blocked():
            self._processes = [
                subprocess.Popen(
                    command, env=common | (_rank_variables(rank, ranks) if ranks > 1 else {}), stdout=pipe, stderr=pipe
                )
                for rank in range(ranks)
            ]
        outputs = [pipe for process in self._processes for pipe in (process.stdout, process.stderr) if pipe]
        self._readers = [threading.Thread(target=_forward_lines, args=(output, prefix)) for output in outputs]
        for reader in self._readers:
            reader.start()
        self._failed, self._deadline = 0, float("inf")

    def poll(self) -> int | None:
        """Exit code of the first rank that failed, or 0, once all have ended; ends the others when one has failed."""
        running = [process for process in self._processes if process.poll() is None]
        codes = [process.returncode for process in self._processes if process.returncode]
        if not running:
            return self._failed or next(iter(codes), 0)
        if codes and not self._failed:
            self._failed, self._deadline = codes[0], time.monotonic() + GRACE_S
            self.send_signal(signal.SIGTERM)
        if time.monotonic() > self._deadline:
            self.send_signal(signal.SIGKILL)
        return None

    def send_signal(self, number: int) -> None:
        """Send a signal to every rank that still runs."""
        for process in self._processes:
            process.send_signal(number)

    def close(self) -> None:
        """Kill what still runs, and wait for its output."""
        for process in self._processes:
            process.kill()
            process.wait()
        for reader in self._readers:
            reader.join()


class Signals:
    """The signals to this process, which its jobs get too."""

    def __init__(self) -> None:
        self.jobs: list[RankProcesses] = []
        """Jobs that run now."""
        self.received: list[int] = []
        """Signals until now, Ctrl-C among them."""

    def _forward(self, number: int, _: FrameType | None) -> None:
        self.received.append(number)
        # A terminal sends Ctrl-C to the ranks too, which save and exit; a scheduler's signal must be forwarded.
        if number != signal.SIGINT:
            for job in self.jobs:
                job.send_signal(number)


@contextmanager
def forwarding_signals() -> Iterator[Signals]:
    """Forwards signals to jobs; afterwards, none of the jobs that it still has is left."""
    signals = Signals()
    numbers = (signal.SIGTERM, stop_signal.SIGNAL, signal.SIGINT)
    before = {number: signal.signal(number, signals._forward) for number in numbers}
    try:
        with stop_signal.unblocked():
            yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        close_all(signals.jobs)


def close_all(jobs: Iterable[RankProcesses]) -> None:
    """Kill what still runs of these jobs."""
    for job in jobs:
        job.close()


def _forward_lines(pipe: IO[bytes], prefix: str) -> None:
    """Print each line of a process behind a prefix, as soon as it is complete."""
    with pipe:
        for line in pipe:
            sys.stderr.write(f"{prefix}{line.decode(errors='replace')}")
            sys.stderr.flush()


def _rank_variables(rank: int, ranks: int) -> dict[str, str]:
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks)}
