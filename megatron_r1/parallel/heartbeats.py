"""Heartbeats: each rank says in the job's store, every few seconds, that it lives and what it does.

A thread of each rank talks to the store, which may block for ever when the process that keeps it is stopped; nothing
else here blocks.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from types import FrameType
from typing import Any

import orjson
import torch.distributed as dist

from megatron_r1.parallel import phases
from megatron_r1.parallel.phases import Phase

HEARTBEAT_S = 15.0
"""Seconds between two heartbeats of a rank."""
LEFT = b"left"
"""In their place once the rank has ended."""
CLOSE_S = 5.0
LOOK_S = 1.0
"""Seconds between two looks at whether a rank has failed; a new phase is sent then, too."""
FAILED, STALLED = "failed", "stalled"
"""Keys of what the first rank says that has failed, and that has found a deadline passed."""
CALLS, CALL = "roll calls", "roll call"
"""Keys of how many roll calls there were, and of the number of the last one."""
NEWS = "news"
"""Key that is set once one of the others is."""
COLLECTIVES = os.path.join("torch", "distributed", "distributed_c10d.py")


@dataclass(frozen=True, slots=True)
class Beat:
    """What a rank says of itself."""

    number: int
    host: str
    pid: int
    phase: Phase
    step: int
    seconds: float
    """For which it is in the phase."""
    waits: int = 0
    """How often it has begun to wait for others by `Waiting`; every rank does so at the same places."""
    waiting: bool = False
    """Whether it waits so now."""
    in_collective: bool = False
    """Whether its main thread is in a call of torch.distributed."""
    collectives: dict[str, int] = field(default_factory=dict)
    """Process group -> how many collective operations it has begun there."""
    answered_call: int = 0
    """Number of the last roll call that it has heard."""

    @property
    def place(self) -> str:
        """Phase and step for a message."""
        return phases.place(self.phase, self.step)


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a rank has ended, as the others say it."""

    text: str
    """With the rank, its host and its phase."""
    code: int
    """Exit code of the other ranks."""

    def encoded(self) -> str:
        return orjson.dumps(asdict(self)).decode()


class Heartbeats:
    """The heartbeats of this rank, and what it knows of the others'.

    Attributes:
        waits, waiting: as of `Beat`; `Waiting` counts.
        beats: the last one of each rank: of all ranks on rank 0, of rank 0 on the others.
        heard: when that came, by this process's `time.monotonic`; infinity for a rank that has ended.
        failed: what the first rank that failed says; None as long as none has.
        stalled: what the first rank says that has found a deadline passed; empty as long as none has.
        answered: when the store last answered.
        gone: whether the process that keeps the store has ended.
    """

    def __init__(self, store: dist.Store, rank: int, ranks: int, interval_s: float):
        """
        Args:
            store: of all ranks. A wait occupies its connection, so each thread has one of its own.
        """
        self.rank, self.ranks, self.interval_s = rank, ranks, interval_s
        self.waits, self.waiting, self.watched = 0, False, False
        self.beats: dict[int, Beat] = {}
        self.heard: dict[int, float] = {}
        self.failed: Failure | None = None
        self.stalled = ""
        self.gone = False
        self.answered = time.monotonic()
        self._raw: dict[int, bytes] = {}
        self._store = store
        self._number = self._answered_call = 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(store.clone(),), name="heartbeats", daemon=True)
        self._thread.start()

    def beat(self) -> Beat:
        """What this rank does now."""
        return current_beat(self._number, self.waits, self.waiting, self._answered_call)

    def silent(self, limit_s: float) -> dict[int, float]:
        """Ranks that this rank listens to and that have sent nothing for longer, with the seconds."""
        now = time.monotonic()
        ages = {rank: now - since for rank, since in self.heard.items() if rank != self.rank}
        return {rank: age for rank, age in ages.items() if age > limit_s}

    def everyone(self) -> dict[int, Beat]:
        """The last beat of every rank that has not ended; may block as long as the store does."""
        store = self._store.clone()
        keys = {rank: heartbeat_key(rank) for rank in range(self.ranks)}
        found = {rank: store.get(key) for rank, key in keys.items() if store.check([key])}
        return {rank: parsed(raw) for rank, raw in found.items() if raw != LEFT}

    def first(self, key: str, text: str) -> str:
        """Set `key` unless another rank has; returns what it holds. May block as long as the store does."""
        store = self._store.clone()
        held = str(store.compare_set(key, "", text).decode())
        store.set(NEWS, "")
        return held

    def call(self) -> int:
        """Have every rank that lives send a heartbeat at once that has the returned number in `answered_call`, or a
        higher one. May block as long as the store does."""
        store = self._store.clone()
        number = int(store.add(CALLS, 1))
        store.set(CALL, str(number))
        store.set(NEWS, "")
        return number

    def keeper(self) -> str:
        """The process that keeps the store, for a message: rank 0, or torchrun on its machine."""
        beat = self.beats.get(0)
        where = f" on {beat.host}, whose last heartbeat was {beat.place}," if beat else ""
        launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        return f"the launcher of rank 0{where}" if launcher else f"rank 0{where}"

    def count(self, key: str, more: int = 1) -> int:
        """Add to a number of all ranks; returns it. May block as long as the store does."""
        return int(self._store.clone().add(key, more))

    def close(self) -> None:
        """Send no more heartbeats, and say so: others that still wait for this rank wait in vain."""
        self._stopped.set()
        self._thread.join(CLOSE_S)
        if not self._thread.is_alive():
            with suppress(dist.DistNetworkError):
                self._store.set(heartbeat_key(self.rank), LEFT.decode())

    def _run(self, store: dist.Store) -> None:
        watched = range(1, self.ranks) if self.rank == 0 else range(1)
        keys = [heartbeat_key(rank) for rank in watched]
        sent, due = phases.current(), 0.0
        try:
            while not self._stopped.is_set():
                called = self._look_at_news(store)
                if (now := time.monotonic()) >= due or called or phases.current() is not sent:
                    sent = phases.current()
                    self._number += 1
                    store.set(heartbeat_key(self.rank), orjson.dumps(asdict(self.beat())).decode())
                if now >= due:
                    due = now + self.interval_s
                    if keys and store.check(keys):  # a rank that is still starting has none
                        self._listen(dict(zip(watched, store.multi_get(keys), strict=True)))
                self.answered = time.monotonic()
                self._stopped.wait(min(LOOK_S, self.interval_s))
        except dist.DistNetworkError:
            self.gone = True

    def _look_at_news(self, store: dist.Store) -> bool:
        """Whether there is a roll call that this rank has not answered."""
        if not store.check([NEWS]):
            return False
        if not self.failed and (failure := _value(store, FAILED)):
            self.failed = Failure(**orjson.loads(failure))
        self.stalled = self.stalled or _value(store, STALLED)
        before, self._answered_call = self._answered_call, int(_value(store, CALL) or 0)
        return self._answered_call > before

    def _listen(self, raw: Mapping[int, bytes]) -> None:
        for rank, content in raw.items():
            if content == LEFT:
                self.heard[rank] = float("inf")
            elif content != self._raw.get(rank):
                self.heard[rank] = time.monotonic()
                self.beats[rank] = parsed(content)
            self._raw[rank] = content


def current_beat(number: int = 0, waits: int = 0, waiting: bool = False, answered_call: int = 0) -> Beat:
    """What this process does now."""
    now = phases.current()
    return Beat(
        number,
        socket.gethostname(),
        os.getpid(),
        now.phase,
        now.step,
        round(time.monotonic() - now.since, 1),
        waits,
        waiting,
        in_collective(),
        collectives(),
        answered_call,
    )


def heartbeat_key(rank: int) -> str:
    return f"alive/{rank}"


def parsed(raw: bytes) -> Beat:
    """A beat from what the store holds."""
    return Beat(**orjson.loads(raw))


def _value(store: dist.Store, key: str) -> str:
    return store.get(key).decode() if store.check([key]) else ""


def collectives() -> dict[str, int]:
    """How many collective operations this process has begun, by process group."""
    found: dict[str, int] = {}
    with suppress(RuntimeError):  # the main thread makes or destroys groups
        groups: list[Any] = [*dist.distributed_c10d._world.pg_map]
        for group in groups:
            if group is not dist.GroupMember.NON_GROUP_MEMBER:
                found[group.group_name] = group._get_sequence_number_for_group()
    return found


def in_collective() -> bool:
    """Whether the main thread is in a call of torch.distributed."""
    frame: FrameType | None = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame:
        if frame.f_code.co_filename.endswith(COLLECTIVES):
            return True
        frame = frame.f_back
    return False


def within[Value](seconds: float, call: Callable[[], Value]) -> Value | None:
    """What a call returns that may block for ever or fail; None where it does, or takes longer."""
    found: list[Value] = []

    def run() -> None:
        with suppress(Exception):
            found.append(call())

    thread = threading.Thread(target=run, name="within", daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0] if found else None
