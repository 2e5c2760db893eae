"""A pipeline in the terminal: a line for each rank, its passes as coloured blocks."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from megatron_r1.plan.pictures.labels import KINDS, OVERLAPPED, duration_text
from megatron_r1.plan.pipeline.simulate import PassEvent, Timeline

IDLE = "·"
STYLES = {
    "forward": "white on blue",
    "backward": "black on green",
    "backward_input": "black on cyan",
    "backward_weight": "black on yellow",
    OVERLAPPED: "white on magenta",
}


def terminal_pipeline(timeline: Timeline, width: int = 100) -> RenderableType:
    """The timeline of each rank, with an axis of time and a legend.

    A block begins with the letter of its kind, and the number of its micro-batch where it is wide enough.

    Args:
        width: characters of the timeline, beside the names of ranks.
    """
    scale = width / timeline.seconds if timeline.seconds else 0.0
    lines = [_line(timeline, rank, width, scale) for rank in range(timeline.schedule.ranks)]
    bubble = f"{timeline.schedule.name}: {duration_text(timeline.seconds)}, {timeline.bubble:.1%} idle"
    return Group(Text(bubble, style="bold"), *lines, _axis(timeline.seconds, width), _legend(timeline))


def _line(timeline: Timeline, rank: int, width: int, scale: float) -> Text:
    characters, styles = [IDLE] * width, ["dim"] * width
    events = timeline.of_rank(rank)
    for number, event in enumerate(events):
        first, last = round(event.start * scale), min(width, round(event.end * scale))
        kind = OVERLAPPED if event.paired else event.kind
        characters[first:last] = _label(_together(events, number), last - first)
        styles[first:last] = [STYLES[kind]] * (last - first)
    line = Text(f"rank {rank:<3} ")
    for character, style in zip(characters, styles, strict=True):
        line.append(character, style)
    return line.append(f" {timeline.busy[rank] / timeline.seconds:4.0%} busy" if timeline.seconds else "")


def _together(events: list[PassEvent], number: int) -> list[PassEvent]:
    """The event, or it and the forward pass that overlaps with its backward pass."""
    event = events[number]
    return events[number - 1 : number + 1] if event.paired and event.kind != "forward" else [event]


def _label(events: list[PassEvent], width: int) -> str:
    """Letters and micro-batches as far as they fit, else letters."""
    letters = [KINDS[event.kind].letter for event in events]
    numbered = "".join(f"{letter}{event.micro_batch}" for letter, event in zip(letters, events, strict=True))
    return (numbered if len(numbered) <= width else "".join(letters)[:width]).ljust(width)


def _axis(seconds: float, width: int) -> Text:
    marks = [" "] * (width + 12)
    for quarter in range(5):
        text = duration_text(seconds * quarter / 4)
        first = round(width * quarter / 4)
        marks[first : first + len(text)] = text
    return Text(" " * 9 + "".join(marks).rstrip(), style="dim")


def _legend(timeline: Timeline) -> Text:
    legend = Text(" " * 9)
    events = timeline.events
    kinds = {event.kind for event in events if not event.paired}
    for name, kind in KINDS.items():
        if name in kinds:
            legend.append(f"{kind.letter}", STYLES[name]).append(f" {kind.text}   ")
    if any(event.paired for event in events):
        legend.append("FB", STYLES[OVERLAPPED]).append(" forward and backward pass overlapped   ")
    return legend.append(IDLE, "dim").append(" idle")
