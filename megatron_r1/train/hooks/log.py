"""Show and record the metrics of each step."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from megatron_r1.track.tracker import Tracker
from megatron_r1.train.hooks import Hook
from megatron_r1.train.hooks.phases import phase_seconds
from megatron_r1.train.state import TrainState


class LogHook(Hook):
    """Records every step in the tracker, and every `interval` steps prints a line, or on a terminal updates a bar."""

    def __init__(self, tracker: Tracker, shown: Sequence[str], total: int, start: int, interval: int, title: str):
        """
        Args:
            tracker: records every row.
            shown: metrics on the terminal, in order.
            total: steps of the run; start: steps already done.
            interval: steps between lines.
        """
        self._tracker, self._shown, self._total, self._interval = tracker, shown, total, interval
        self._console = Console(file=sys.stderr, highlight=False)
        self._started, self._start = time.monotonic(), start
        self._title = title
        self._seconds: Counter[str] = Counter()
        """By phase, since the last line."""
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[metrics]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task(title, total=total, completed=start, metrics="")
        self._progress.start()

    def after_step(self, state: TrainState, row: dict[str, Any]) -> None:
        self._tracker.log(state.step, row)
        metrics = "  ".join(f"{name} {_short(row[name])}" for name in self._shown if row.get(name) is not None)
        self._progress.update(self._task, completed=state.step, metrics=metrics)
        self._seconds.update(phase_seconds(row))
        last = state.step == self._total
        if not self._console.is_terminal and (last or state.step % self._interval == 0):
            remaining_s = (time.monotonic() - self._started) / (state.step - self._start) * (self._total - state.step)
            where = f"{self._title} {state.step}/{self._total}"
            line = f"{where}  {metrics}  {_shares(self._seconds)}  {remaining_s:.0f} s left"
            self._console.print(line, soft_wrap=True)
            self._seconds.clear()

    def finish(self, state: TrainState) -> None:
        self._progress.stop()
        self._tracker.close()


def _shares(seconds: Counter[str]) -> str:
    """The phases that took most of the time, with their shares."""
    total = sum(seconds.values()) or 1.0
    return ", ".join(f"{phase} {took / total:.0%}" for phase, took in seconds.most_common(3) if took >= 0.01 * total)


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
