"""Where a run belongs in wandb: its id, project, group, job type, tags and notes."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_r1.config.jobs import TrackConfig
from megatron_r1.errors import PlatformError
from megatron_r1.files import write_whole

MODES = {"online": "online", "offline": "offline", "disabled": "disabled", "run": "online", "dryrun": "offline"}
"""Value of wandb's own variable WANDB_MODE -> mode."""
RUN_ID = "run_id.txt"


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
    """The stages of one recipe are a group, each with its verb as job type."""

    name: str
    project: str
    job_type: str
    entity: str | None = None
    group: str | None = None
    tags: tuple[str, ...] = ()
    notes: str | None = None

    @classmethod
    def of(cls, name: str, track: TrackConfig, job_type: str, environment: Mapping[str, str]) -> Identity:
        """The identity of a run; wandb's own environment variables may set another group or notes, or more tags.

        Args:
            job_type: verb of the command line.
        """
        further = [tag.strip() for tag in environment.get("WANDB_TAGS", "").split(",") if tag.strip()]
        return cls(
            name=name,
            project=track.project,
            job_type=job_type,
            entity=track.entity or None,
            group=environment.get("WANDB_RUN_GROUP") or track.group or None,
            tags=tuple(dict.fromkeys([job_type, *track.tags, *further])),
            notes=environment.get("WANDB_NOTES") or track.notes or None,
        )


def run_id(wandb_folder: Path) -> str:
    """The id of the run whose `wandb/` folder this is; made at its first start, and the same at every later one."""
    path = wandb_folder / RUN_ID
    wandb_folder.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        write_whole(path, secrets.token_hex(4).encode())
    return path.read_text().strip()
