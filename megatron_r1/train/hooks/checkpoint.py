"""Saves the run every few steps and at its end."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from megatron_r1.checkpoint.store import CheckpointStore, SaveFailed, Write
from megatron_r1.parallel.phases import phase
from megatron_r1.train.hooks import Hook
from megatron_r1.train.state import TrainState

logger = logging.getLogger(__name__)


class CheckpointHook(Hook):
    """Commits checkpoints; training continues after a failed save, except after the last one."""

    def __init__(
        self,
        store: CheckpointStore,
        snapshot: Callable[[TrainState], Write],
        metadata: dict[str, Any],
        interval: int,
        resumed_at: int,
        background: bool = False,
        last_is_kept: Callable[[], bool] = lambda: True,
    ):
        """
        Args:
            store: where checkpoints go.
            snapshot: copies this rank's state; returns a function that writes the copy into a folder.
            metadata: for each manifest.
            interval: steps between checkpoints.
            resumed_at: step of the checkpoint that the run started from; it is not saved again.
            background: write while training continues; there is one save at a time, so the next one waits for it.
            last_is_kept: collective: whether the step after which the loop ended is to be saved.
        """
        self._store, self._snapshot, self._metadata = store, snapshot, metadata
        self._interval, self._background, self._last_is_kept = interval, background, last_is_kept
        self._saved = self._saving = resumed_at
        self._value: float | None = None

    def after_step(self, state: TrainState, row: dict[str, Any]) -> None:
        self._value = row.get(self._store.retention.metric, self._value)
        due = state.step % self._interval == 0
        with self._surviving():
            if self._store.saving and (due or self._store.written()):
                self._settle()
        if due:
            with self._surviving():
                self._save(state, self._background)

    def finish(self, state: TrainState) -> None:
        with self._surviving():
            self._settle()
        if self._last_is_kept() and state.step != self._saved:
            self._save(state, background=False)

    def _save(self, state: TrainState, background: bool) -> None:
        self._saving = state.step
        metadata = self._metadata | self._store.retention.metadata(self._value)
        self._value = None  # a checkpoint's value is of the newest row since the checkpoint before
        with phase("save"):
            self._store.begin(state.step, self._snapshot(state), metadata, background=background)
        if not background:
            self._settle()

    def _settle(self) -> None:
        if not self._store.saving:
            return
        with phase("save"):
            self._store.settle()
            self._saved = self._saving
            self._store.prune()

    @contextmanager
    def _surviving(self) -> Iterator[None]:
        try:
            yield
        except SaveFailed as error:
            message = "step %d: %s; training continues, the next save is at the next interval"
            logger.error(message, self._saving, error)
