"""Ends an attempt of a run whose loss or gradient norm has a spike, so that the next start goes back before it."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from megatron_r1.config.watch import WatchConfig
from megatron_r1.errors import Requeue
from megatron_r1.parallel import comm
from megatron_r1.platform.launcher import is_rank_zero
from megatron_r1.train.hooks import Hook
from megatron_r1.train.hooks.spikes import COUNT, WATCHED
from megatron_r1.train.rewinds import Rewind
from megatron_r1.train.state import TrainState

logger = logging.getLogger(__name__)

POSITION, REWINDS = "train/data_position", "train/rewinds"


class RewindHook(Hook):
    """Decides on rank 0, by the spikes in each row; all ranks learn of it when the loop has ended.

    What it knows of earlier steps is in the rows that they left, so a resumed run decides as if it had not stopped.
    """

    def __init__(
        self,
        watch: WatchConfig,
        steps: int,
        rewinds: Sequence[Rewind],
        state: TrainState,
        earlier: Iterable[Mapping[str, Any]],
        saved_steps: Callable[[], Iterable[int]],
        record: Callable[[Rewind], None],
    ):
        """
        Args:
            steps: of the run; nothing follows the last one, which therefore undoes nothing.
            rewinds: those of the run so far.
            state: from which this attempt starts.
            earlier: rows of the run before it; of use on rank 0.
            saved_steps: returns the steps of the run's checkpoints, called on rank 0.
            record: makes a rewind known to the next attempt, called on rank 0.
        """
        self._watch, self._steps, self._rewinds = watch, steps, rewinds
        self._saved_steps, self._record = saved_steps, record
        self._spikes = 0
        """Consecutive steps with a spike, up to the newest one."""
        self._positions: deque[tuple[int, int]] = deque(
            maxlen=watch.rewind_after_spikes + watch.rewind_margin_steps + 1
        )
        """The newest steps, and the position in the data after each."""
        for row in earlier:
            self._note(row["step"], row.get(POSITION), row.get(COUNT, 0))
        if not self._positions or self._positions[-1][0] != state.step:
            self._positions.append((state.step, state.data_position))
        self._due: Rewind | None = None
        self._agreed = False

    def after_step(self, state: TrainState, row: dict[str, Any]) -> None:
        if not is_rank_zero():
            return
        row[POSITION] = state.data_position
        row[REWINDS] = sum(rewind.first_step <= state.step for rewind in self._rewinds)
        self._note(state.step, state.data_position, row[COUNT])
        if self._spikes >= self._watch.rewind_after_spikes and state.step < self._steps:
            self._due = self._plan(state, row)

    def stop_requested(self) -> bool:
        return self._due is not None

    def due(self) -> bool:
        """Collective: whether the run goes back, so that its last step is not worth saving."""
        if not self._agreed:
            self._due, self._agreed = comm.broadcast(self._due), True
        return self._due is not None

    def finish(self, state: TrainState) -> None:
        """Record the rewind, if one is due.

        Raises:
            Requeue: one is due; the next start goes back.
        """
        if not self.due():
            return
        rewind = self._due
        assert rewind
        if is_rank_zero():
            self._record(rewind)
        raise Requeue(
            f"the spike from step {rewind.spike_step} to {rewind.last_step} is confirmed: the same command goes back "
            f"to the newest checkpoint before step {rewind.first_step} and skips {rewind.skip_to - rewind.skip_from} "
            f"sequences (rewind {len(self._rewinds) + 1} of at most watch.max_rewinds={self._watch.max_rewinds})"
        )

    def _note(self, step: int, position: int | None, spikes: int) -> None:
        self._spikes = self._spikes + 1 if spikes else 0
        if position is not None:
            self._positions.append((step, position))

    def _plan(self, state: TrainState, row: Mapping[str, Any]) -> Rewind | None:
        """The rewind after this step; None, with the reason in the log, where there can be none."""
        spike_step = state.step - self._spikes + 1
        before = max(0, spike_step - 1 - self._watch.rewind_margin_steps)
        # The oldest one where none is so old, as after a resume of a run that did not record them.
        position = next(position for step, position in self._positions if step >= before)
        if len(self._rewinds) >= self._watch.max_rewinds:
            problem = f"it already did so watch.max_rewinds={self._watch.max_rewinds} times"
        elif not any(step <= before for step in self._saved_steps()):
            problem = f"it has no checkpoint before step {before + 1}"
        else:
            return Rewind(
                first_step=before + 1,
                spike_step=spike_step,
                last_step=state.step,
                skip_from=position,
                skip_to=state.data_position,
                values={name: row[name] for name in WATCHED if name in row},
            )
        if self._spikes == self._watch.rewind_after_spikes:
            logger.warning("step %d: the spike is confirmed, but the run does not go back: %s", state.step, problem)
        return None
