"""Records the metrics of one run: the same rows in `metrics.jsonl`, always, and in wandb, which may fail."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from megatron_r1.config.jobs import TrackConfig
from megatron_r1.track import metrics
from megatron_r1.track.artifacts import add_files, add_table
from megatron_r1.track.identity import Identity, wandb_mode
from megatron_r1.track.record import Record, read_metrics
from megatron_r1.track.sample_tables import Rows, read_tables, write_table
from megatron_r1.track.wandb_run import Action, WandbRun

logger = logging.getLogger(__name__)


class Tracker:
    """Records rows; only one rank may have a tracker for a run folder.

    Args:
        run_folder: created if missing; for `metrics.jsonl` and `wandb/`.
        config: resolved configuration, for wandb's page of the run.
        name: name of the run.
        verb: of the command line; wandb's job type.
        resume_step: step of the checkpoint from which the run resumes; later rows are removed and recorded again.
    """

    def __init__(
        self,
        run_folder: Path,
        config: Mapping[str, Any],
        name: str,
        track: TrackConfig,
        verb: str,
        resume_step: int = 0,
    ):
        run_folder.mkdir(parents=True, exist_ok=True)
        path = run_folder / "metrics.jsonl"
        self._record = Record(path, resume_step)
        mode = wandb_mode(track.wandb, os.environ)
        identity = Identity.of(name, track, verb, os.environ)
        logger.info("wandb: %s%s", mode, f", in {run_folder / 'wandb'}" if mode == "offline" else "")
        self._folder, self._title = run_folder, f"{identity.group}-{name}" if identity.group else name
        self.in_wandb = mode != "disabled"
        """Whether wandb gets anything."""
        tables = [self._samples(rows) for rows in read_tables(run_folder, resume_step)] if self.in_wandb else []
        self._wandb = WandbRun(run_folder, mode, config, identity, read_metrics(path), tables)
        files = [run_folder / "config.yaml", run_folder / "environment.json", *sorted(run_folder.glob("provenance/*"))]
        self._wandb.add(add_files("config", self._title, files))

    def log(self, step: int, row: Mapping[str, Any]) -> None:
        """Records the metrics of one step; steps must increase.

        Raises:
            ValueError: `step` is not above the last one, or a name is not in the registry of metrics.
        """
        metrics.check(row)
        self._record.append(step, row)
        self._wandb.log(step, row)

    def add_samples(self, step: int, rows: Rows) -> None:
        """Adds a table of sampled responses, of a step that is not logged yet; one that cannot be written is logged."""
        try:
            write_table(self._folder, step, rows)
        except OSError as error:
            logger.warning("step %d: no table of samples: %s", step, error)
            return
        self._wandb.add(self._samples(rows))

    def _samples(self, rows: Rows) -> Action:
        return add_table("samples", self._title, "responses", rows)

    def close(self) -> None:
        self._record.close()
        self._wandb.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
