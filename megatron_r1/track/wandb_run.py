"""A wandb run on which training never depends.

But for a wrong WANDB_MODE, nothing here raises: the first failure is logged as one warning, and wandb is not used any
more. Offline it opens no connection. wandb is imported when a run is opened, and its output does not appear on the
terminal.
"""

from __future__ import annotations

import logging
import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_r1.errors import PlatformError
from megatron_r1.track.metrics import METRICS, STEP

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 30.0
FINISH_TIMEOUT_S = 60.0
MODES = {"online": "online", "offline": "offline", "disabled": "disabled", "run": "online", "dryrun": "offline"}
"""Value of wandb's own variable WANDB_MODE -> mode."""
"""Most seconds for which a hanging network can delay the start and the end of an online run."""


def wandb_mode(setting: str, environment: Mapping[str, str]) -> str:
    """online, offline or disabled. For the setting `auto`: WANDB_MODE, else online if there is a WANDB_API_KEY.

    Raises:
        PlatformError: WANDB_MODE is something else.
    """
    if setting != "auto":
        return setting
    if mode := environment.get("WANDB_MODE", ""):
        if mode not in MODES:
            raise PlatformError(f"WANDB_MODE={mode}: must be one of {', '.join(MODES)}")
        return MODES[mode]
    return "online" if environment.get("WANDB_API_KEY") else "offline"


@dataclass(frozen=True)
class Identity:
    """Name, group and tags of a run in wandb: the runs of one pipeline are a group, each with its verb as job type."""

    name: str
    project: str
    group: str
    job_type: str
    tags: tuple[str, ...]

    @classmethod
    def of(cls, folder: Path, name: str, project: str, verb: str, environment: Mapping[str, str]) -> Identity:
        """The identity of the run in `folder`; wandb's own environment variables may set another group or more tags."""
        group = environment.get("WANDB_RUN_GROUP") or folder.resolve().parent.name
        further = [tag.strip() for tag in environment.get("WANDB_TAGS", "").split(",") if tag.strip()]
        return cls(name, project, group, verb, tuple(dict.fromkeys([verb, *further])))


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

    wandb loses rows that it had not yet written when a run was killed, so a resumed run is completed from the local
    record. Online, the missing rows are sent; offline, all rows are written again, and the replaced offline folders are
    removed when the run is closed.

    Args:
        folder: run folder; wandb writes to `folder/wandb`, where the id is stored too.
        mode: online, offline or disabled.
        config: resolved configuration of the run.
        identity: name, group and tags in wandb.
        history: rows of the local record before the resume; without any, a new wandb run is opened.
    """

    def __init__(
        self,
        folder: Path,
        mode: str,
        config: Mapping[str, Any],
        identity: Identity,
        history: Sequence[Mapping[str, Any]] = (),
    ):
        self._run: Any = None
        self._next_step = 0
        self._replaced: list[Path] = []
        # If an online run cannot start, its rows are written offline, for `wandb sync`.
        for attempt in {"online": ("online", "offline"), "offline": ("offline",)}.get(mode, ()):
            try:
                run_id = self._run_id(folder / "wandb" / "run_id.txt", new=not history)
                self._replaced = list(folder.glob(f"wandb/offline-run-*-{run_id}*")) if attempt == "offline" else []
                self._run = self._open(folder, attempt, dict(config), identity, run_id)
                break
            except Exception as error:
                self._give_up(f"could not start {attempt}", error)
        else:
            return
        self._next_step = self._run.starting_step
        for row in history:
            self.log(row["step"], row)

    @staticmethod
    def _run_id(path: Path, new: bool) -> str:
        """The run's wandb id, stored in a file so that a resumed run has the same."""
        path.parent.mkdir(parents=True, exist_ok=True)
        if new or not path.is_file():
            path.write_text(secrets.token_hex(4))
        return path.read_text().strip()

    @staticmethod
    def _open(folder: Path, mode: str, config: dict[str, Any], identity: Identity, run_id: str) -> Any:
        import wandb

        settings = wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,
            disable_code=True,
            init_timeout=START_TIMEOUT_S,
            finish_timeout=FINISH_TIMEOUT_S,
        )
        run = wandb.init(
            dir=folder,
            mode=mode,  # type: ignore[arg-type]
            config=config,
            name=identity.name,
            project=identity.project,
            group=identity.group,
            job_type=identity.job_type,
            tags=identity.tags,
            id=run_id,
            resume="allow" if mode == "online" else None,
            reinit="create_new",
            settings=settings,
        )
        define_metrics(run)
        return run

    def log(self, step: int, row: Mapping[str, Any]) -> None:
        """Sends one row, unless the server has that step from an earlier start of the same run."""
        if self._run is None or step < self._next_step:
            return
        try:
            self._run.log(dict(row) | {"step": step}, step=step)
        except Exception as error:
            self._give_up("could not log", error)

    def close(self) -> None:
        run, self._run = self._run, None
        if run is None:
            return
        try:
            run.finish()
        except Exception as error:
            self._give_up("could not finish", error)
        else:
            for folder in self._replaced:
                shutil.rmtree(folder, ignore_errors=True)

    def _give_up(self, what: str, error: Exception) -> None:
        self._run = None
        logger.warning("wandb %s: %s; metrics.jsonl is still written", what, " ".join(str(error).split()))
