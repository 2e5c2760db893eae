"""What this process does now, since when, and how many seconds each phase of its work lasted.

Code says `with phase("rollout"):`. Phases nest; a moment counts to the innermost one alone, so the seconds of all
phases add up to the time that has passed. Only the main thread is in phases: what other threads do beside it takes no
time of a step, and `phase` does nothing there.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

from megatron_r1.parallel.trace import traced

Phase = Literal[
    "start",
    "server_start",
    "step",
    "weight_sync",
    "rollout",
    "rewards",
    "log_probs",
    "update",
    "optimizer",
    "evaluation",
    "save",
    "end",
]
"""`start`: all before the first step, with the reading of weights. `server_start`: the start of engines. `step`: what a
step does outside of the phases in it, such as reading data. `log_probs`: forward passes before the updates of a
rollout. `update`: passes over micro-batches. `optimizer`: its step, with the gathering of new weights. `end`: all after
the last step."""
PHASES: tuple[Phase, ...] = get_args(Phase)
IN_PHASE = "in phase "


@dataclass(frozen=True, slots=True)
class Current:
    """What the process does now."""

    phase: Phase
    step: int
    """The step under way, or before the first one 0."""
    since: float
    """When it came into this phase, or came back to it, by `time.monotonic`."""

    @property
    def place(self) -> str:
        """Phase and step for a message."""
        return place(self.phase, self.step)


def place(phase: Phase, step: int) -> str:
    """Phase and step for a message."""
    return f"{IN_PHASE}{phase} of step {step}" if step else f"{IN_PHASE}{phase}"


def place_of(error: BaseException) -> str:
    """The phase and step in which an error was raised, which its traceback shows too; empty outside of phases."""
    return next((note for note in getattr(error, "__notes__", ()) if note.startswith(IN_PHASE)), "")


class PhaseClock:
    """The phases of one thread. Other threads may read `current`."""

    def __init__(self, step: int = 0) -> None:
        self._outer: list[Phase] = []
        self._seconds: dict[Phase, float] = {}
        self.current = Current("start", step, time.monotonic())

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Be in a phase meanwhile."""
        self._outer.append(self.current.phase)
        self.move_to(name)
        try:
            yield
        except BaseException as error:
            if not place_of(error):
                error.add_note(self.current.place)
            raise
        finally:
            self.move_to(self._outer.pop())

    def move_to(self, name: Phase, step: int | None = None) -> None:
        """Go from the innermost phase to another one, which is of the same step unless a step is given."""
        before, now = self.current, time.monotonic()
        self._seconds[before.phase] = self._seconds.get(before.phase, 0.0) + now - before.since
        self.current = Current(name, before.step if step is None else step, now)

    def take_seconds(self) -> dict[Phase, float]:
        """Seconds of each phase since the last call, the current one's so far included."""
        self.move_to(self.current.phase)
        seconds, self._seconds = self._seconds, {}
        return seconds


_clock = PhaseClock()


def _of_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


@contextmanager
def phase(name: Phase) -> Iterator[None]:
    """Be in a phase meanwhile."""
    if not _of_main_thread():
        yield
        return
    with _clock.phase(name), traced(name):
        yield


def begin_run() -> None:
    """A run starts: it is in phase `start`, and no seconds have passed."""
    global _clock
    if _of_main_thread():
        _clock = PhaseClock()


def begin_step(step: int) -> None:
    """The innermost phase is `step`, of this step, from now on."""
    if _of_main_thread():
        _clock.move_to("step", step)


def end_steps() -> None:
    """The innermost phase is `end` from now on."""
    if _of_main_thread():
        _clock.move_to("end")


def current() -> Current:
    """What the main thread does now; any thread may call this."""
    return _clock.current


def take_seconds() -> dict[Phase, float]:
    """Seconds of each phase since the last call, or since the run began."""
    return _clock.take_seconds()
