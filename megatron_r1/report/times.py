"""Where the time of a run went, by phase, from its rows."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_r1.track.metrics import PHASE_SECONDS

Rows = Sequence[Mapping[str, Any]]

BESIDE_STEPS = ("start", "server_start", "end")
"""Phases that are no part of a step."""


def seconds_of(row: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of each phase in a row."""
    return {
        name.removeprefix(PHASE_SECONDS): float(value)
        for name, value in row.items()
        if name.startswith(PHASE_SECONDS) and isinstance(value, int | float) and math.isfinite(value)
    }


def step_seconds(row: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of each phase of a step in a row."""
    return {phase: seconds for phase, seconds in seconds_of(row).items() if phase not in BESIDE_STEPS}


def times_of(rows: Rows) -> dict[str, Any]:
    """The table of phases, the longest first, and the ranks that were named as slow; no lines without times.

    With several ranks, a line has the smallest, median and largest time of a step too, and the rank that was slowest
    in most of the rows that name one.
    """
    total: Counter[str] = Counter()
    for row in rows:
        total.update(seconds_of(row))
    whole = sum(total.values())
    several = any(f"{_SLOWEST}{phase}" in row for row in rows for phase in total)
    spread = ["s a step: min", "median", "max", "slowest rank"] if several else []
    return {
        "header": ["phase", "time", "share", *spread],
        "lines": [
            [phase, f"{seconds:.1f} s", f"{100 * seconds / whole:.1f} %", *(_spread(rows, phase) if several else ())]
            for phase, seconds in total.most_common()
            if seconds
        ],
        "slow": [
            f"{name}: {times:.1f} times the median (step {row['step']})"
            for row in rows
            if isinstance(named := row.get("perf/stragglers"), Mapping)
            for name, times in named.items()
        ],
    }


_SLOWEST = "perf/slowest_rank/"


def _spread(rows: Rows, phase: str) -> list[str]:
    """Means over the rows with a spread, and the rank."""
    found = [row for row in rows if f"{_SLOWEST}{phase}" in row]
    if not found:
        return [""] * 4
    names = [f"perf/phase_seconds_{kind}/{phase}" for kind in ("min", "median", "max")]
    means = [math.fsum(row.get(name, math.nan) for row in found) / len(found) for name in names]
    [(rank, times)] = Counter(row[f"{_SLOWEST}{phase}"] for row in found).most_common(1)
    return [*(f"{mean:.3g}" for mean in means), f"{rank} ({times} of {len(found)} times)"]
