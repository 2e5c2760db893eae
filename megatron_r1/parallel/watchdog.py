"""Ends a run that hangs, within a bounded time, and says which rank the others wait for.

A thread of each rank looks at the rank's phase (`phases`) and at the heartbeats of others (`heartbeats`). When a
deadline has passed, every rank that still can writes the Python stacks of its threads and its last collective
operations into the logs of the run; then all of them end with the same line on stderr and exit code 89, also those
whose main thread never comes back from a collective operation. Nothing of the state changes: no optimizer steps, and
checkpoints are as they were.

Time in which this rank waits for another one outside of collective operations is none of its phase: the one that works
has a deadline of its own. Neither is time in which the whole process was stopped, as by Ctrl-Z.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TextIO

from megatron_r1.config.watch import WatchConfig
from megatron_r1.errors import ExitCode
from megatron_r1.parallel import phases
from megatron_r1.parallel.behind import ranks_behind, shown
from megatron_r1.parallel.flight_recorder import last_collectives
from megatron_r1.parallel.heartbeats import HEARTBEAT_S, STALLED, Beat, Heartbeats, within
from megatron_r1.parallel.phases import Phase
from megatron_r1.parallel.waiting import heartbeats

logger = logging.getLogger(__name__)

ACT_S = 10.0
"""Seconds for anything that may block, such as writing a file."""
FAILED_S = 30.0
"""Seconds that a rank gets to end by itself after another has failed."""
KEYS: Mapping[Phase, str] = {
    "start": "start",
    "server_start": "start",
    "rollout": "rollout",
    "rewards": "rollout",
    "step": "step",
    "weight_sync": "step",
    "log_probs": "step",
    "update": "step",
    "optimizer": "step",
    "evaluation": "evaluation",
    "save": "save",
    "end": "save",
}
"""Phase -> the deadline that it has."""


@dataclass(frozen=True)
class Stall:
    """Why a run ends: a line that names the rank, its host, its phase and for how long."""

    text: str
    code: ExitCode = ExitCode.STALLED


class Watchdog:
    """Watches this rank from a thread of its own, from the start of the run until `close`."""

    def __init__(
        self,
        config: WatchConfig,
        folder: Path,
        rank: int,
        end: Callable[[int], object] = os._exit,
    ):
        """
        Args:
            folder: for the stacks; made if missing.
            end: ends the process, with an exit code.
        """
        self._rank, self._folder, self._end_process = rank, folder, end
        self._limits = {
            "start": config.start_deadline_s,
            "rollout": config.rollout_deadline_s,
            "step": config.step_deadline_s,
            "evaluation": config.evaluation_deadline_s,
            "save": config.save_deadline_s,
        }
        self._heartbeat_limit_s = config.heartbeat_deadline_s
        self._tick_s = heartbeat_interval(config) / 2
        self._before = time.monotonic()
        self._failed_s = self._age = 0.0
        self._progress: object = None
        self._stacks = self._open_stacks()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop watching."""
        self._stopped.set()
        self._thread.join(ACT_S)
        faulthandler.cancel_dump_traceback_later()
        self._stacks.close()
        path = Path(self._stacks.name)
        with suppress(OSError):
            if not path.stat().st_size:
                path.unlink()

    def _open_stacks(self) -> TextIO:
        self._folder.mkdir(parents=True, exist_ok=True)
        return (self._folder / f"stacks-rank-{self._rank:05}.txt").open("a", encoding="utf-8")

    def _run(self) -> None:
        while not self._stopped.wait(self._tick_s):
            if self._heartbeat_limit_s:
                # Of code that keeps the interpreter to itself, so that no thread runs, not even this one.
                faulthandler.dump_traceback_later(self._heartbeat_limit_s, file=self._stacks)
            if verdict := self.verdict():
                self._end(verdict)
                return

    def verdict(self) -> Stall | None:
        """Why the run has to end now, if it has; to be called at regular intervals."""
        job, now = heartbeats(), time.monotonic()
        passed, self._before = min(now - self._before, 2 * self._tick_s), now
        if job:
            job.watched = self._heartbeat_limit_s > 0
            if found := self._others(job, passed):
                return found
        current = phases.current()
        progress = current, job and (job.waits, job.waiting)
        self._age = 0.0 if self._progress != progress or (job and job.waiting) else self._age + passed
        self._progress = progress
        key = KEYS[current.phase]
        limit = self._limits[key]
        if not limit or self._age <= limit:
            return None
        setting = f"watch.{key}_deadline_s={limit:g}"
        return Stall(self._agreed(job, setting) if job else self._alone(current.place, setting))

    def _others(self, job: Heartbeats, passed: float) -> Stall | None:
        """What this rank knows of others that have failed, or send no heartbeats."""
        if job.stalled:
            return Stall(job.stalled)
        lost = job.gone and phases.current().phase != "end"  # there a rank may be the last
        self._failed_s = self._failed_s + passed if job.failed or lost else 0.0
        if self._failed_s > FAILED_S:
            if job.failed:
                return Stall(job.failed.text, ExitCode(job.failed.code))
            return Stall(f"{job.keeper()} has ended", ExitCode.REQUEUE)
        if not (limit := self._heartbeat_limit_s):
            return None
        setting = f"watch.heartbeat_deadline_s={limit:g}"
        here = f"; rank {self._rank} is {phases.current().place}"
        for rank, age in job.silent(limit).items():
            beat = (within(ACT_S, job.everyone) or job.beats).get(rank, job.beats[rank])
            last = f"the last one was {beat.place}{here}"
            text = f"rank {rank} on {beat.host} has sent no heartbeat for {age:.0f} s ({setting}); {last}"
            return Stall(within(ACT_S, partial(job.first, STALLED, text)) or text)
        if (age := time.monotonic() - job.answered) > limit:
            return Stall(f"{job.keeper()} has not answered for {age:.0f} s ({setting}){here}")
        return None

    def _alone(self, place: str, setting: str) -> str:
        return f"rank {self._rank} on {socket.gethostname()} has been {place} for {self._age:.0f} s ({setting})"

    def _agreed(self, job: Heartbeats, setting: str) -> str:
        """Which rank is behind, as the first rank says whose deadline has passed."""
        wait_s = 2 * job.interval_s + 1.0
        if not (before := within(ACT_S, job.everyone)):
            return f"{job.keeper()} does not answer; {self._alone(phases.current().place, setting)}"
        time.sleep(wait_s)
        beats = within(ACT_S, job.everyone) or before
        silent = [rank for rank, beat in beats.items() if rank in before and before[rank].number == beat.number]
        text = self._text(beats, silent or ranks_behind(beats), bool(silent), setting)
        return within(ACT_S, partial(job.first, STALLED, text)) or text

    def _text(self, beats: Mapping[int, Beat], behind: list[int], silent: bool, setting: str) -> str:
        first = beats[behind[0]]
        others = [rank for rank in beats if rank not in behind]
        name = shown(behind) + f" on {first.host}"
        where = f"{first.place} for {first.seconds:.0f} s" + (", without heartbeats since" if silent else "")
        waiting = f"; {shown(others)} wait{'s' if len(others) == 1 else ''} for it" if others else ""
        return f"{name} {'is' if len(behind) == 1 else 'are'} behind: {where} ({setting}){waiting}"

    def _end(self, stall: Stall) -> None:
        """Write what is known, give other ranks the time to do so too, and end the process."""
        line = f"megatron-r1: {stall.text}; stacks in {self._stacks.name}"
        within(ACT_S, lambda: os.write(2, f"{line}\n".encode()))
        within(ACT_S, lambda: self._write(line))
        within(ACT_S, lambda: logger.error("%s", line, extra={"file_only": True}))
        if job := heartbeats():
            self._stopped.wait(2 * job.interval_s + 1.0)
        if not self._stopped.is_set():  # else the main thread has ended meanwhile, with an error of its own
            self._end_process(int(stall.code))

    def _write(self, line: str) -> None:
        """The stacks first: they are of use without the collective operations."""
        self._stacks.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {socket.gethostname()} pid {os.getpid()}: {line}\n")
        self._stacks.flush()
        faulthandler.dump_traceback(self._stacks)
        self._stacks.write("\n")
        self._stacks.flush()
        for name, content in last_collectives().items():
            (self._folder / f"{name}-rank-{self._rank:05}.json").write_bytes(content)


def heartbeat_interval(config: WatchConfig) -> float:
    """Seconds between two heartbeats: a quarter of the shortest deadline, at most `HEARTBEAT_S`."""
    deadlines = (
        *(config.start_deadline_s, config.rollout_deadline_s, config.step_deadline_s),
        *(config.evaluation_deadline_s, config.save_deadline_s, config.heartbeat_deadline_s),
    )
    return min([HEARTBEAT_S, *(deadline / 4 for deadline in deadlines if deadline)])


@contextmanager
def watchdog(config: WatchConfig, folder: Path, rank: int) -> Iterator[None]:
    """Meanwhile a watchdog watches this rank; arguments as of `Watchdog`."""
    watching = Watchdog(config, folder, rank)
    try:
        yield
    finally:
        watching.close()
