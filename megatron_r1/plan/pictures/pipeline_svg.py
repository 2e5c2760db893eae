"""A pipeline as inline SVG: a row for each rank, a box for each pass, over time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from html import escape

from megatron_r1.plan.pictures.labels import KINDS, duration_text, ticks
from megatron_r1.plan.pipeline.simulate import PassEvent, Timeline

LEFT, ROW, TOP, WIDTH, GAP = 64, 24, 6, 1060, 26
"""Pixels: of the ranks' names, of a row, above the rows, of the timeline, and where its middle is left out."""
MOST_PASSES = 200
"""Passes of a rank that are drawn; of a longer step those at its beginning and its end."""
CHARACTER = 6.5
"""Pixels of a digit."""


@dataclass(frozen=True, slots=True)
class Window:
    """A part of the step that is drawn."""

    first: float
    last: float
    left: float
    """Pixels of its beginning."""
    width: float

    def x(self, seconds: float) -> float:
        """Pixels of a moment."""
        return (
            self.left + (min(max(seconds, self.first), self.last) - self.first) / (self.last - self.first) * self.width
        )


def pipeline_svg(timeline: Timeline) -> str:
    """The drawing, without a legend; empty for a step that takes no time.

    Boxes of later chunks are lighter. A forward and a backward pass that overlap share a box's height.
    """
    if not timeline.seconds:
        return ""
    ranks = timeline.schedule.ranks
    height = TOP + ranks * ROW + 34
    shown = windows(timeline)
    parts = [f'<svg role="img" class="timeline" viewBox="0 0 {LEFT + WIDTH + 92} {height}">']
    for rank in range(ranks):
        y = TOP + rank * ROW
        parts.append(f'<text class="name" x="{LEFT - 8}" y="{y + 16}">rank {rank}</text>')
        idle = 1 - timeline.busy[rank] / timeline.seconds
        parts.append(f'<text class="dim" x="{LEFT + WIDTH + 8}" y="{y + 16}">{idle:.1%} idle</text>')
    for window in shown:
        size = f'x="{window.left:.1f}" y="{TOP}" width="{window.width:.1f}" height="{ranks * ROW - 2}"'
        parts.append(f'<rect class="idle" {size}/>')
        parts += _axis(window, TOP + ranks * ROW)
        parts += [_box(event, window, half) for rank in range(ranks) for event, half in _drawn(timeline, rank, window)]
    if len(shown) > 1:
        middle = LEFT + WIDTH / 2
        parts.append(f'<text class="cut" x="{middle}" y="{TOP + ranks * ROW / 2 + 4}">…</text>')
    return "".join([*parts, "</svg>"])


def windows(timeline: Timeline, most: int = MOST_PASSES) -> list[Window]:
    """The whole step, or its beginning and its end with about `most` passes of a rank between them."""
    passes = max(map(len, timeline.schedule.order))
    if passes <= most:
        return [Window(0.0, timeline.seconds, LEFT, WIDTH)]
    length, width = timeline.seconds * most / passes / 2, (WIDTH - GAP) / 2
    return [
        Window(0.0, length, LEFT, width),
        Window(timeline.seconds - length, timeline.seconds, LEFT + width + GAP, width),
    ]


def _drawn(timeline: Timeline, rank: int, window: Window) -> Iterator[tuple[PassEvent, int]]:
    """A rank's passes in a window, each with the half of the row that it takes: 0 is all of it."""
    for event in timeline.of_rank(rank):
        if event.end > window.first and event.start < window.last and event.end > event.start:
            yield event, 0 if not event.paired else 1 if event.kind == "forward" else 2


def _axis(window: Window, y: int) -> Iterator[str]:
    for moment in ticks(window.first, window.last, about=max(2, round(window.width / 130))):
        x = window.x(moment)
        yield f'<path class="tick" d="M{x:.1f} {y - 2}v5"/>'
        yield f'<text class="axis" x="{x:.1f}" y="{y + 16}">{duration_text(moment)}</text>'


def _box(event: PassEvent, window: Window, half: int) -> str:
    x, end = window.x(event.start), window.x(event.end)
    width, kind = max(0.2, end - x - 0.5), KINDS[event.kind]
    y = TOP + event.rank * ROW + (ROW // 2 - 1 if half == 2 else 0)
    height = ROW - 2 if half == 0 else ROW // 2 - 1
    opacity = 1.0 / (1 + 0.25 * event.chunk)
    about = f"{kind.text}, micro-batch {event.micro_batch}, chunk {event.chunk}, rank {event.rank}: "
    about += f"{duration_text(event.start)} to {duration_text(event.end)}"
    shape = f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{height}" fill="{kind.colour}"'
    box = f'{shape} fill-opacity="{opacity:.2f}"><title>{escape(about)}</title></rect>'
    label = str(event.micro_batch)
    if width < CHARACTER * len(label) + 2:
        return box
    size = "box" if half == 0 else "box small"
    return f'{box}<text class="{size}" x="{x + width / 2:.1f}" y="{y + height / 2 + 3.5:.1f}">{label}</text>'
