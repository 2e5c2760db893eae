"""The graph of a recipe's stages as inline SVG: a box for each stage, coloured by its state, below what it needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

WIDTH, HEIGHT, ACROSS, DOWN = 168, 46, 16, 34
"""Size of a box, and space between boxes, in pixels."""
STATES = ("done", "running", "stale", "failed", "missing")

Stages = Sequence[Mapping[str, Any]]


def needs_of(stage: Mapping[str, Any]) -> list[str]:
    """The stages that a stage takes something from, or only follows."""
    inputs, needs = stage.get("inputs"), stage.get("needs")
    sources = [str(value).partition(".")[0] for value in inputs.values()] if isinstance(inputs, Mapping) else []
    return list(dict.fromkeys([*sources, *(map(str, needs) if isinstance(needs, list) else [])]))


def graph_svg(stages: Stages) -> str:
    """The drawing; empty without stages."""
    named = {str(stage["name"]): stage for stage in stages if stage.get("name")}
    if not named:
        return ""
    places = _places(named)
    widest = max(x for x, _ in places.values()) + WIDTH
    deepest = max(y for _, y in places.values()) + HEIGHT
    edges = [
        _edge(places[need], places[name], "takes" if need in _sources(stage) else "follows")
        for name, stage in named.items()
        for need in needs_of(stage)
        if need in places
    ]
    boxes = [_box(name, stage, *places[name]) for name, stage in named.items()]
    size = f'width="{widest + 4:.0f}" height="{deepest + 4:.0f}" viewBox="-2 -2 {widest + 4:.0f} {deepest + 4:.0f}"'
    return f'<svg role="img" class="graph" {size}>{"".join(edges + boxes)}</svg>'


def _sources(stage: Mapping[str, Any]) -> set[str]:
    return set(needs_of({"inputs": stage.get("inputs")}))


def _places(named: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[float, float]]:
    """Left and top of each box: one row below the lowest that it needs, near the middle of those."""
    rows: dict[int, list[str]] = {}
    for name, depth in _depths(named).items():
        rows.setdefault(depth, []).append(name)
    widest = max(map(len, rows.values())) * (WIDTH + ACROSS)
    places: dict[str, tuple[float, float]] = {}
    for depth in sorted(rows):
        above = {name: [places[need][0] for need in needs_of(named[name]) if need in places] for name in rows[depth]}
        order = sorted(rows[depth], key=lambda name: sum(above[name]) / max(1, len(above[name])))
        left = (widest - len(order) * (WIDTH + ACROSS)) / 2
        for number, name in enumerate(order):
            places[name] = (left + number * (WIDTH + ACROSS), depth * (HEIGHT + DOWN))
    return places


def _depths(named: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """Longest way to each stage; as many rounds as there are stages, so that a circle ends too."""
    depths = dict.fromkeys(named, 0)
    for _ in named:
        for name, stage in named.items():
            above = [depths[need] for need in needs_of(stage) if need in depths and need != name]
            depths[name] = min(len(named), max(above, default=-1) + 1)
    return depths


def _edge(source: tuple[float, float], target: tuple[float, float], kind: str) -> str:
    """A curve from below a box to above another; a long one, which passes behind others, is fainter."""
    x, y = source[0] + WIDTH / 2, source[1] + HEIGHT
    end_x, end_y = target[0] + WIDTH / 2, target[1]
    middle = (y + end_y) / 2
    curve = f"M{x:.0f} {y:.0f} C{x:.0f} {middle:.0f} {end_x:.0f} {middle:.0f} {end_x:.0f} {end_y:.0f}"
    far = " far" if end_y - y > DOWN else ""
    return f'<path class="{kind}{far}" d="{curve}"/>'


def _box(name: str, stage: Mapping[str, Any], x: float, y: float) -> str:
    state = str(stage.get("state"))
    seconds = stage.get("seconds")
    time = f", {duration(seconds)}" if isinstance(seconds, int | float) and seconds else ""
    below = escape(f"{stage.get('verb', '?')}: {state}{time}")
    why = f"<title>{escape(str(stage['why']))}</title>" if stage.get("why") else ""
    kind = state if state in STATES else "missing"
    return (
        f'<g class="stage {kind}">{why}<rect x="{x:.0f}" y="{y:.0f}" width="{WIDTH}" height="{HEIGHT}" rx="6"/>'
        f'<text class="name" x="{x + 10:.0f}" y="{y + 19:.0f}">{escape(name)}</text>'
        f'<text class="below" x="{x + 10:.0f}" y="{y + 36:.0f}">{below}</text></g>'
    )


def duration(seconds: float) -> str:
    """Seconds in words."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"
