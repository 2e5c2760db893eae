"""What a run leaves in wandb beside its metrics: files and tables, as artefacts with versions."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
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


def add_table(kind: str, name: str, table: str, rows: Sequence[Mapping[str, Any]]) -> Callable[[Any], None]:
    """An action for `WandbRun.add`: log rows as one artefact with a table, which wandb's pages can sort and filter.

    Args:
        kind, name: as of `add_files`.
        table: name of the table.
        rows: any keys; a value that is no number, truth value or text is shown as text.
    """

    def log_artifact(run: Any) -> None:
        import wandb

        columns = [*dict.fromkeys(key for row in rows for key in row)]
        data = [[_cell(row.get(column)) for column in columns] for row in rows]
        artifact = wandb.Artifact(_allowed(f"{name}-{kind}"), type=kind)
        artifact.add(wandb.Table(columns=columns, data=data, allow_mixed_types=True), table)
        run.log_artifact(artifact)

    return log_artifact


def _cell(value: Any) -> Any:
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _allowed(name: str) -> str:
    """A name with the characters that wandb allows for artefacts."""
    return re.sub(r"[^A-Za-z0-9_.-]", "-", name)
