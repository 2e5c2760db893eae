"""Names, letters and colours that the pictures of a plan have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor, log10

from megatron_r1.plan.pipeline.schedule import Kind

OVERLAPPED = "overlapped"


@dataclass(frozen=True, slots=True)
class KindLabel:
    """How passes of one kind are shown."""

    letter: str
    text: str
    colour: str


KINDS: dict[Kind, KindLabel] = {
    "forward": KindLabel("F", "forward", "#3b82f6"),
    "backward": KindLabel("B", "backward", "#17a673"),
    "backward_input": KindLabel("I", "backward: gradients of inputs", "#00a3b4"),
    "backward_weight": KindLabel("W", "backward: gradients of weights", "#e08a00"),
}


def duration_text(seconds: float) -> str:
    """Seconds in a unit that suits them."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs" if seconds else "0"


def ticks(first: float, last: float, about: int = 8) -> Sequence[float]:
    """Round numbers between two, about so many."""
    step = (last - first) / about
    size = 10.0 ** floor(log10(step))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= step)
    return [step * number for number in range(-int(-first // step), int(last // step) + 1)]
