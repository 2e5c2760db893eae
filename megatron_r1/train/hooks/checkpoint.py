"""Save the run every so many steps and at its end."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from megatron_r1.checkpoint.store import CheckpointStore, SaveFailed, Write
from megatron_r1.train.hooks import Hook
from megatron_r1.train.state import TrainState

logger = logging.getLogger(__name__)


class CheckpointHook(Hook):
    """Commits checkpoints; a failed one is survived, except the last."""

    def __init__(
        self,
        store: CheckpointStore,
        snapshot: Callable[[TrainState], Write],
        metadata: dict[str, Any],
        interval: int,
        resumed_at: int,
        background: bool = False,
    ):
        """
        Args:
            store: where checkpoints go.
            snapshot: takes what this rank has to save; what it returns writes that into a folder.
            metadata: goes into each manifest.
            interval: steps between checkpoints.
            resumed_at: step of the checkpoint that the run started from; it is not saved again.
            background: write while training goes on; one save at a time, so the next waits for it.
        """
        self._store, self._snapshot, self._metadata = store, snapshot, metadata
        self._interval, self._background = interval, background
        self._saved = self._saving = resumed_at

    def after_step(self, state: TrainState, row: dict[str, Any]) -> None:
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
        if state.step != self._saved:
            self._save(state, background=False)

    def _save(self, state: TrainState, background: bool) -> None:
        self._saving = state.step
        self._store.begin(state.step, self._snapshot(state), self._metadata, background=background)
        if not background:
            self._settle()

    def _settle(self) -> None:
        if self._store.saving:
            self._store.settle()
            self._saved = self._saving
            self._store.prune()

    @contextmanager
    def _surviving(self) -> Iterator[None]:
        try:
            yield
        except SaveFailed as error:
            told = "step %d: %s; training goes on, the next try is at the next interval"
            logger.error(told, self._saving, error)
