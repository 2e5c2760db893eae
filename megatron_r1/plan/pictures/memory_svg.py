"""Memory of each pipeline rank as inline SVG: a bar of its parts, beside what a GPU has."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from megatron_r1.memory.parts import GB, MemoryParts
from megatron_r1.plan.pictures.labels import ticks
from megatron_r1.plan.pictures.pipeline_svg import LEFT, ROW, TOP, WIDTH
from megatron_r1.report.figures import COLOURS

OTHER = "other"


def largest_parts(stages: Sequence[MemoryParts]) -> dict[str, str]:
    """Part -> its colour, largest over all ranks first; what has no colour of its own is `other`."""
    totals: dict[str, float] = {}
    for stage in stages:
        for name, amount in stage.parts.items():
            totals[name] = totals.get(name, 0.0) + amount
    names = sorted(totals, key=lambda name: -totals[name])
    shown = names if len(names) <= len(COLOURS) else [*names[: len(COLOURS) - 1], OTHER]
    return dict(zip(shown, COLOURS, strict=False))


def memory_svg(stages: Sequence[MemoryParts], limit: float) -> str:
    """The drawing, without a legend; empty without ranks.

    Args:
        limit: bytes of a GPU, drawn as a line; 0 draws none.
    """
    if not stages:
        return ""
    colours = largest_parts(stages)
    most = 1.02 * max(limit, *(stage.total for stage in stages))
    bottom = TOP + len(stages) * ROW
    parts = [f'<svg role="img" class="timeline" viewBox="0 0 {LEFT + WIDTH + 92} {bottom + 34}">']
    for rank, stage in enumerate(stages):
        parts += _bar(rank, stage, colours, WIDTH / most)
    for amount in ticks(0.0, most / GB):
        x = LEFT + amount * GB / most * WIDTH
        parts.append(f'<path class="tick" d="M{x:.1f} {bottom - 2}v5"/>')
        parts.append(f'<text class="axis" x="{x:.1f}" y="{bottom + 16}">{amount:g} GB</text>')
    if limit:
        x = LEFT + limit / most * WIDTH
        parts.append(f'<path class="limit" d="M{x:.1f} {TOP - 4}V{bottom + 2}"/>')
    return "".join([*parts, "</svg>"])


def _bar(rank: int, stage: MemoryParts, colours: dict[str, str], scale: float) -> list[str]:
    y, x = TOP + rank * ROW, float(LEFT)
    parts = [f'<text class="name" x="{LEFT - 8}" y="{y + 16}">rank {rank}</text>']
    shares = {name: stage.parts.get(name, 0.0) for name in colours}
    if OTHER in colours:
        shares[OTHER] = stage.total - sum(shares.values())
    for name, amount in shares.items():
        if amount > 0:
            about = f"rank {rank}, {name}: {amount / GB:.1f} GB"
            shape = f'x="{x:.1f}" y="{y}" width="{amount * scale:.1f}" height="{ROW - 4}" fill="{colours[name]}"'
            parts.append(f"<rect {shape}><title>{escape(about)}</title></rect>")
            x += amount * scale
    parts.append(f'<text class="dim" x="{LEFT + WIDTH + 8}" y="{y + 15}">{stage.total / GB:.1f} GB</text>')
    return parts
