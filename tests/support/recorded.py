"""What a run recorded, held against the registry of metrics."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from megatron_r1.track.metrics import STEP, find


def unregistered(rows: Iterable[Mapping[str, object]], command: str) -> list[str]:
    """Names of metrics in the rows that the registry does not list for the command; fails where there is no row."""
    names = {name for row in rows for name in row} - {STEP}
    assert names, f"{command} recorded nothing"
    return sorted(name for name in names if command not in find(name).commands)
