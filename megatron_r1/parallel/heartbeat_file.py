"""`heartbeat.json` in the run's folder: what every rank does now, for a person or a monitor.

A file that is older than a minute says that its rank 0, or its machine, is stopped.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson

from megatron_r1.parallel.heartbeats import Beat, current_beat
from megatron_r1.parallel.waiting import heartbeats

logger = logging.getLogger(__name__)

NAME = "heartbeat.json"


@contextmanager
def heartbeat_file(run_folder: Path, interval_s: float) -> Iterator[None]:
    """Meanwhile a thread writes the file at this interval, on rank 0; at the end it says that the run is over."""
    path, stopped = run_folder / NAME, threading.Event()

    def work() -> None:
        while not stopped.wait(interval_s):
            _write(path, running=True)

    _write(path, running=True)
    thread = threading.Thread(target=work, name="heartbeat file", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join(interval_s)
        if not thread.is_alive():  # else the disk hangs
            _write(path, running=False)


def _write(path: Path, running: bool) -> None:
    part = path.with_name(f"{NAME}.tmp")
    try:
        part.write_bytes(orjson.dumps(content(running), option=orjson.OPT_INDENT_2))
        part.replace(path)
    except OSError as error:
        logger.debug("cannot write %s: %s", path, error)  # a full disk must not end the run through this file


def content(running: bool) -> dict[str, Any]:
    """What the file says: the time, rank 0's phase, and every rank with the seconds since its last heartbeat."""
    now, job, own = time.monotonic(), heartbeats(), current_beat()
    heard = {0: now} | (job.heard if job else {})
    beats = {0: own} | (job.beats if job else {})
    ranks = [_entry(rank, beat, max(0.0, now - heard[rank])) for rank, beat in sorted(beats.items())]
    head = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "unix_time": round(time.time(), 1), "running": running}
    return head | {key: ranks[0][key] for key in ("step", "phase", "phase_seconds", "host", "pid")} | {"ranks": ranks}


def _entry(rank: int, beat: Beat, age: float) -> dict[str, Any]:
    return {
        "rank": rank,
        "host": beat.host,
        "pid": beat.pid,
        "step": beat.step,
        "phase": beat.phase,
        "phase_seconds": beat.seconds,
        "waits_for_others": beat.waiting,
        "heartbeat_age": round(age, 1),
    }
