"""What a run leaves in wandb beside its metrics: files and tables, as artefacts with versions."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any


def add_files(kind: str, name: str, paths: Iterable[Path]) -> Callable[[Any], None]:
    """An action for `WandbRun.add`: log the files that exist as one artefact; none of them, no artefact.

    Args:
        kind: type of the artefact, such as config or report.
        name: of the run; the artefact is NAME-KIND, and a run of the same name adds a version.
    """
    chosen = [*paths]

    def log_artifact(run: Any) -> None:
        import wandb

        found = [path for path in chosen if path.is_file()]
        if not found:
            return
        artifact = wandb.Artifact(_allowed(f"{name}-{kind}"), type=kind)
        for path in found:
            artifact.add_file(str(path), name=path.name)
        run.log_artifact(artifact)

    return log_artifact


def _allowed(name: str) -> str:
    """A name with the characters that wandb allows for artefacts."""
    return re.sub(r"[^A-Za-z0-9_.-]", "-", name)
