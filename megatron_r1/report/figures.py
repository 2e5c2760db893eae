"""Curves as inline SVG: small, with axis labels and units, in the page's own font and text colour."""

from __future__ import annotations

import io
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, MaxNLocator, PercentFormatter

from megatron_r1.report.times import step_seconds

COLOURS = ("#3b82f6", "#e08a00", "#17a673", "#c2559d", "#8b6fd6", "#7d8794", "#b5a100", "#00a3b4")
LOAD_LEVELS = 21
"""Colours of a heat map; with many more, matplotlib would embed its scale as an image."""
MAX_POINTS = 600
INK = "#010203"
"""Placeholder for the page's text colour until the figure is written; no curve has this colour."""

Rows = Sequence[dict[str, Any]]
Points = tuple[list[float], list[float]]


def series(rows: Rows, key: str) -> Points:
    """Steps and finite values of one metric; a list, such as the load of each expert, gives its largest share."""
    steps, values = [], []
    for row in rows:
        value = row.get(key)
        if isinstance(value, list):
            numbers = [float(share) for share in value if isinstance(share, (int, float))]
            value = max(numbers, default=None)
        if isinstance(value, (int, float)) and math.isfinite(value):
            steps.append(float(row["step"]))
            values.append(float(value))
    return steps, values


def thinned(points: Points, limit: int = MAX_POINTS) -> Points:
    """At most `limit` points, each the mean of its neighbours."""
    size = math.ceil(len(points[0]) / limit)
    if size <= 1:
        return points
    buckets = [[axis[i : i + size] for i in range(0, len(axis), size)] for axis in points]
    steps, values = ([math.fsum(bucket) / len(bucket) for bucket in axis] for axis in buckets)
    return steps, values


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """Running mean over `window` values, centred; shorter at both ends."""
    half = window // 2
    slices = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [math.fsum(part) / len(part) for part in slices]


def curves(name: str, rows: Rows, metrics: dict[str, str], ylabel: str, share: bool = False, log: bool = False) -> str:
    """One figure with a line per metric that was recorded; empty if none was.

    Args:
        name: of the figure; line ids are `curve-NAME-METRIC`.
        metrics: metric -> its label in the legend.
        ylabel: quantity and unit of the values.
        log: use a logarithmic axis where all values are above 0 and their range is wide.
    """
    found = {key: thinned(points) for key in metrics if len((points := series(rows, key))[0])}
    if not found:
        return ""
    return _drawn(name, found, metrics, ylabel, log)


def by_minutes(rows: Rows) -> Rows:
    """The rows of a stage, with steps replaced by the minutes of all steps so far; none where a row has no times."""
    spent, timed = 0.0, []
    for row in rows:
        if not (seconds := step_seconds(row)):
            return []
        spent += sum(seconds.values()) / 60
        timed.append({**row, "step": spent})
    return timed


def comparison(name: str, runs: Mapping[str, Rows], metric: str, ylabel: str, xlabel: str = "step") -> str:
    """One figure with a line per run that recorded the metric; empty if fewer than two did.

    Args:
        name: of the figure; line ids are `curve-NAME-RUN`.
        runs: rows by name of the run.
        xlabel: label of the rows' steps.
    """
    found = {run: thinned(points) for run, rows in runs.items() if len((points := series(rows, metric))[0])}
    return _drawn(name, found, {run: run for run in found}, ylabel, False, xlabel) if len(found) > 1 else ""


def bars(name: str, shares: Mapping[str, float], xlabel: str) -> str:
    """Shares as horizontal bars, the first on top, cut off at 0 and 1; empty for none."""
    if not shares:
        return ""
    figure, axes = _axes(xlabel, "")
    figure.set_size_inches(7.0, 0.8 + 0.32 * len(shares))
    values = [min(1.0, max(0.0, value)) for value in shares.values()]
    for patch in axes.barh(range(len(values)), values, color=COLOURS[0], height=0.6):
        patch.set_gid(f"curve-{name}")
    axes.set_yticks(range(len(values)), list(shares))
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    return _svg(figure, axes, legend=False)


def written_alone(svg: str) -> str:
    """A figure as a separate file, black on white, because there is no page with colours."""
    return svg.replace("<svg ", '<svg xmlns:xlink="http://www.w3.org/1999/xlink" style="background: white" ', 1)


def heat_map(name: str, table: Mapping[str, Sequence[float]], xlabel: str, label: str) -> str:
    """Values around 1 as colours: a line per name of the table, a column per number; empty for an empty table."""
    if not table:
        return ""
    figure, axes = _axes(xlabel, "")
    columns = max(map(len, table.values()))
    values = [[*line, *[math.nan] * (columns - len(line))] for line in table.values()]
    colours = matplotlib.colormaps["coolwarm"].resampled(LOAD_LEVELS)
    edges = [column - 0.5 for column in range(columns + 1)], range(len(table) + 1)
    mesh = axes.pcolormesh(*edges, values, cmap=colours, vmin=0.0, vmax=2.0)
    mesh.set_gid(f"curve-{name}")
    axes.invert_yaxis()
    axes.grid(False)
    shown = range(0, len(table), math.ceil(len(table) / 16))
    axes.set_yticks([line + 0.5 for line in shown], [list(table)[line] for line in shown])
    bar = figure.colorbar(mesh, ax=axes, extend="max")
    bar.set_label(label, color=INK, fontsize=9)
    bar.ax.tick_params(colors=INK, labelsize=8)
    bar.outline.set_visible(False)
    return _svg(figure, axes, legend=False)


def _drawn(
    name: str, found: dict[str, Points], labels: dict[str, str], ylabel: str, log: bool, xlabel: str = "step"
) -> str:
    figure, axes = _axes(xlabel, ylabel)
    for (key, (steps, values)), colour in zip(found.items(), COLOURS, strict=False):
        noisy = len(values) > 60
        width, alpha = (0.8, 0.3) if noisy else (1.6, 1.0)
        marker = "o" if len(values) < 25 else ""
        [line] = axes.plot(steps, values, color=colour, linewidth=width, alpha=alpha, marker=marker, markersize=2.5)
        line.set_gid(f"curve-{name}-{key}")
        if noisy:
            axes.plot(steps, smoothed(values, len(values) // 20), color=colour, linewidth=1.8)
        axes.plot([], [], color=colour, label=labels[key])
    everything = [value for _, values in found.values() for value in values]
    if log and min(everything) > 0 and max(everything) > 20 * min(everything):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    return _svg(figure, axes, legend=len(found) > 1)


def stacked_times(name: str, rows: Rows) -> str:
    """The seconds of each step, divided into phases, the longest at the bottom; empty where no times were recorded."""
    timed = [(row["step"], step_seconds(row)) for row in rows]
    timed = [(step, seconds) for step, seconds in timed if seconds]
    total: Counter[str] = Counter()
    for _, seconds in timed:
        total.update(seconds)
    phases = [phase for phase, seconds in total.most_common() if seconds]
    if not phases:
        return ""
    figure, axes = _axes("step", "time of a step (s)")
    steps = [float(step) for step, _ in timed]
    layers = [thinned((steps, [seconds.get(phase, 0.0) for _, seconds in timed])) for phase in phases]
    colours = [COLOURS[index % len(COLOURS)] for index in range(len(phases))]
    stacked = axes.stackplot(layers[0][0], *(values for _, values in layers), labels=phases, colors=colours, alpha=0.75)
    for phase, area in zip(phases, stacked, strict=True):
        area.set_gid(f"curve-{name}-{phase}")
    axes.set_ylim(0)
    return _svg(figure, axes, legend=True)


def _axes(xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(4.6, 2.9), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.grid(True, linewidth=0.4, alpha=0.25, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    axes.tick_params(colors=INK, labelsize=8)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(color=INK, fontsize=9)
    return figure, axes


def _svg(figure: Figure, axes: Axes, legend: bool) -> str:
    if legend:
        figure.legend(loc="outside upper center", ncols=4, frameon=False, fontsize=8, labelcolor=INK)
    out = io.StringIO()
    # Text is kept as text, in the page's font; a fixed salt and no date make equal figures for equal curves.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "megatron_r1"}):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = out.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'<g id="(?!curve-)[^"]*">', "<g>", svg)
    svg = re.sub(r"(font(-family)?): *([^;\"]*px )?[^;\"]*", _page_font, svg)
    return svg.replace(INK, "currentColor").replace("<svg ", '<svg role="img" ', 1)


def _page_font(match: re.Match[str]) -> str:
    return f"font: {match[3]}system-ui, sans-serif" if match[3] else "font-family: system-ui, sans-serif"
