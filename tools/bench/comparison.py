"""Measures several ways to do the same thing in turns within one run, and compares them.

A machine's speed drifts; ways that take turns drift alike, so it is the ratio within a round that says which is faster.

    found = alternate({"ours": seconds_of(step), "theirs": seconds_of(other)}, rounds=7)
    print(describe(found, base="theirs", work=1024, unit="tokens"))
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

Way = Callable[[], float]
"""Does the thing once and returns what it took, in seconds."""


def seconds_of(action: Callable[[], object]) -> Way:
    """The way whose seconds are those of calling `action`."""

    def way() -> float:
        started = time.perf_counter()
        action()
        return time.perf_counter() - started

    return way


def alternate(ways: Mapping[str, Way], rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of each way, a number per round.

    Each round measures all ways in an order of its own, so that none always follows the same one.

    Args:
        ways: by name; each measures itself and leaves out what does not count.
        rounds: measured rounds.
        warm_up: rounds before these, which are not returned.
    """
    names = list(ways)
    found: dict[str, list[float]] = {name: [] for name in names}
    order = random.Random(0)
    for number in range(-warm_up, rounds):
        for name in order.sample(names, len(names)):
            seconds = ways[name]()
            if number >= 0:
                found[name].append(seconds)
    return found


def speed_ratios(found: Mapping[str, Sequence[float]], name: str, base: str) -> list[float]:
    """How many times as fast as `base` the way `name` was, round by round."""
    return [theirs / ours for theirs, ours in zip(found[base], found[name], strict=True)]


def describe(found: Mapping[str, Sequence[float]], base: str, work: float | None = None, unit: str = "") -> str:
    """A line for each way: median seconds, how many times as fast as `base`, and from least to most of both.

    Args:
        found: what `alternate` returned.
        base: the way that the others are compared with.
        work: what a way does once, counted in `unit`; given, the line says how much a second.
    """
    width = max(map(len, found))
    lines = []
    for name, seconds in found.items():
        median = statistics.median(seconds)
        line = f"{name:<{width}}  {_with_spread(seconds, 4)} s"
        if work is not None:
            line += f"  {work / median:.4g} {unit}/s"
        if name != base:
            line += f"  {_with_spread(speed_ratios(found, name, base), 3)} times the speed of {base}"
        lines.append(line)
    return "\n".join(lines)


def _with_spread(numbers: Sequence[float], digits: int) -> str:
    """Median (least-most)."""
    return f"{statistics.median(numbers):.{digits}g} ({min(numbers):.{digits}g}-{max(numbers):.{digits}g})"
