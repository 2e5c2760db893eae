"""A wandb run on which training never depends: a thread of its own starts it, sends rows and ends it.

Nothing here raises, and `log` never waits: the first failure is logged as one warning, and wandb is not used any more.
Offline it opens no connection. wandb is imported when a run is opened, and its output does not appear on the terminal.
"""

from __future__ import annotations

import logging
import queue
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_r1.track.identity import Identity, run_id
from megatron_r1.track.metrics import METRICS, STEP

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 30.0
"""Seconds that an online run has to start; meanwhile training goes on."""
FINISH_TIMEOUT_S = 30.0
"""Seconds that an online run has at its end to send what it still has."""
CLOSE_TIMEOUT_S = START_TIMEOUT_S + 2 * FINISH_TIMEOUT_S
"""Most seconds that the end of a run waits for wandb."""
Action = Callable[[Any], None]
"""What is done with the run of wandb."""
REPLACED = "replaced-"
"""Before the name of an offline folder whose rows are being written to a new one."""
MAX_WAITING = 100_000
"""Rows that may wait for wandb; with more, wandb hangs and is not used any more."""


def define_metrics(run: Any) -> None:
    """Define in wandb the x-axis of every registered metric, and that the summary shows last and best values."""
    run.define_metric(STEP)
    for metric in METRICS:
        # wandb joins the keys of a table with a dot.
        name = f"{metric.name}.*" if metric.table else metric.name
        best = {"higher": "max,last", "lower": "min,last"}.get(metric.better)
        run.define_metric(name, step_metric=STEP, summary=None if metric.table else best)


class WandbRun:
    """One wandb run, continued by its id.

    wandb loses rows that it had not yet written when a run was killed, and has rows after the checkpoint from which the
    run resumes; so a resumed run is completed from the local record. Online, only rows are sent that the server does
    not have. Offline, all rows are written again, and offline folders of earlier starts are removed: an offline run has
    every step once, whatever was killed when.

    Args:
        folder: run folder; wandb writes to `folder/wandb`, where the id is stored too.
        mode: online, offline or disabled.
        config: resolved configuration of the run.
        identity: name, group and tags in wandb.
        history: rows of the local record before the resume.
        earlier: what was added before the resume; an offline run, which is written anew, gets it again.
    """

    def __init__(
        self,
        folder: Path,
        mode: str,
        config: Mapping[str, Any],
        identity: Identity,
        history: Sequence[Mapping[str, Any]] = (),
        earlier: Sequence[Action] = (),
    ):
        self._folder, self._config, self._identity = folder, dict(config), identity
        self._history, self._earlier = history, earlier
        self._run: Any = None
        self._next_step = 0
        self._waiting: queue.Queue[Action | None] = queue.Queue(MAX_WAITING)
        self._failed = threading.Event()
        self._thread: threading.Thread | None = None
        # If an online run cannot start, its rows are written offline, for `track sync`.
        if attempts := {"online": ("online", "offline"), "offline": ("offline",)}.get(mode, ()):
            try:
                # Here: two threads that import modules which need each other would get them half made.
                import wandb  # noqa: F401
            except Exception as error:
                self._give_up("cannot be imported", error)
                return
            self._thread = threading.Thread(target=self._work, args=(attempts,), name="wandb", daemon=True)
            self._thread.start()

    def log(self, step: int, row: Mapping[str, Any]) -> None:
        """Sends one row, unless the server has that step from an earlier start of the same run."""
        content = dict(row)
        self.add(lambda run: self._log(run, step, content))

    def add(self, action: Action) -> None:
        """Have `action` called with the run of wandb, after all that was added before; for artefacts."""
        if self._thread is None or self._failed.is_set():
            return
        try:
            self._waiting.put_nowait(action)
        except queue.Full:
            self._give_up("hangs", RuntimeError(f"{MAX_WAITING} rows wait for it"))

    def close(self) -> None:
        """End the run; waits for wandb, but no longer than CLOSE_TIMEOUT_S."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        if self._failed.is_set():
            return
        try:
            self._waiting.put_nowait(None)
        except queue.Full:
            self._give_up("hangs", RuntimeError(f"{MAX_WAITING} rows wait for it"))
            return
        thread.join(CLOSE_TIMEOUT_S)
        if thread.is_alive() and not self._failed.is_set():
            self._give_up("could not finish", TimeoutError(f"not done after {CLOSE_TIMEOUT_S:.0f} s"))

    def _work(self, attempts: Sequence[str]) -> None:
        try:
            mode = self._start(attempts)
            while (action := self._waiting.get()) and not self._failed.is_set():
                action(self._run)
            self._run.finish()
            if mode == "online":  # the server has all rows
                _remove((self._folder / "wandb").glob("*offline-run-*"))
        except Exception as error:
            self._give_up("failed", error)

    def _start(self, attempts: Sequence[str]) -> str:
        wandb_folder = self._folder / "wandb"
        identifier = run_id(wandb_folder)
        for mode in attempts:
            if mode == "offline":
                # Before the new folder is there, so that no step is ever in two of them.
                for earlier in wandb_folder.glob(f"offline-run-*-{identifier}"):
                    earlier.rename(earlier.with_name(f"{REPLACED}{earlier.name}"))
            try:
                self._run = self._open(mode, identifier)
            except Exception as error:
                if mode == attempts[-1]:
                    raise
                logger.warning("wandb could not start %s: %s; it is written offline", mode, _one_line(error))
                _end_service()
                continue
            self._next_step = self._run.starting_step
            for row in self._history:
                self._log(self._run, row["step"], row)
            self._history = ()
            if mode == "offline":
                for action in self._earlier:
                    action(self._run)
                _remove(wandb_folder.glob(f"{REPLACED}*"))
            return mode
        raise AssertionError("there is a mode")

    def _open(self, mode: str, identifier: str) -> Any:
        import wandb

        settings = wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,
            disable_code=True,
            init_timeout=START_TIMEOUT_S,
            finish_timeout=FINISH_TIMEOUT_S,
        )
        wandb.setup(wandb.Settings(silent=True))  # else its login prints
        run = wandb.init(
            dir=self._folder,
            mode=mode,  # type: ignore[arg-type]
            config=self._config,
            name=self._identity.name,
            project=self._identity.project,
            entity=self._identity.entity,
            group=self._identity.group,
            job_type=self._identity.job_type,
            tags=self._identity.tags,
            notes=self._identity.notes,
            id=identifier,
            resume="allow" if mode == "online" else None,
            reinit="create_new",
            settings=settings,
        )
        define_metrics(run)
        return run

    def _log(self, run: Any, step: int, row: Mapping[str, Any]) -> None:
        if step >= self._next_step:
            run.log(dict(row) | {"step": step}, step=step)

    def _give_up(self, what: str, error: Exception) -> None:
        self._failed.set()
        logger.warning("wandb %s: %s; metrics.jsonl is still written", what, _one_line(error))


def _remove(folders: Iterable[Path]) -> None:
    for folder in [*folders]:
        shutil.rmtree(folder, ignore_errors=True)


def _end_service() -> None:
    """End wandb's service, in which a run that could not start would still own its id."""
    import wandb

    wandb.teardown()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
