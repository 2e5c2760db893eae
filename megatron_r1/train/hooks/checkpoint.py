"""Save the run every so many steps and at its end."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_r1.checkpoint.store import CheckpointStore, SaveFailed
from megatron_r1.train.hooks import Hook
from megatron_r1.train.state import TrainState

logger = logging.getLogger(__name__)


class CheckpointHook(Hook):
    """Commits checkpoints; a failed one is survived, except the last."""

    def __init__(
        self,
        store: CheckpointStore,
        write: Callable[[Path, TrainState], None],
        metadata: dict[str, Any],
        interval: int,
        resumed_at: int,
    ):
        """
        Args:
            store: where checkpoints go.
            write: writes this rank's part of the run into a folder.
            metadata: goes into each manifest.
            interval: steps between checkpoints.
            resumed_at: step of the checkpoint that the run started from; it is not saved again.
        """
        self._store, self._write, self._metadata, self._interval = store, write, metadata, interval
        self._saved = resumed_at

    def after_step(self, state: TrainState, row: dict[str, Any]) -> None:
        if state.step % self._interval == 0:
            try:
                self._save(state)
            except SaveFailed as error:
                logger.error("step %d: %s; training goes on, the next try is at the next interval", state.step, error)

    def finish(self, state: TrainState) -> None:
        if state.step != self._saved:
            self._save(state)

    def _save(self, state: TrainState) -> None:
        self._store.commit(state.step, lambda folder: self._write(folder, state), self._metadata)
        self._saved = state.step
        self._store.prune()
