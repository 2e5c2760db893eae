"""A plan as one self-contained HTML page: its facts, its pipeline, and the memory of each pipeline rank."""

from __future__ import annotations

from collections.abc import Sequence

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from megatron_r1.memory.parts import GB, MemoryParts
from megatron_r1.plan.pictures.labels import KINDS, duration_text
from megatron_r1.plan.pictures.memory_svg import largest_parts, memory_svg
from megatron_r1.plan.pictures.pipeline_svg import pipeline_svg, windows
from megatron_r1.plan.pipeline.simulate import Timeline
from megatron_r1.report.page import POLICY


def html_page(
    title: str, timeline: Timeline, memory: Sequence[MemoryParts], limit: float, facts: Sequence[tuple[str, str]] = ()
) -> str:
    """The page, from `templates/plan.html`; browsers load and run nothing for it.

    Args:
        memory: of each pipeline rank.
        limit: bytes of a GPU; 0 draws none.
        facts: (name, value) of what stands above the pictures, as text.
    """
    loader = ChoiceLoader([PackageLoader("megatron_r1.plan.pictures"), PackageLoader("megatron_r1.report")])
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    events = timeline.events
    kinds = {event.kind for event in events}
    return environment.get_template("plan.html").render(
        policy=POLICY,
        title=title,
        facts=facts,
        schedule=timeline.schedule,
        chunks=1 + max(event.chunk for event in events),
        seconds=duration_text(timeline.seconds),
        idle=f"{timeline.bubble:.1%}",
        overlapped=any(event.paired for event in events),
        shortened=len(windows(timeline)) > 1,
        kinds=[kind for name, kind in KINDS.items() if name in kinds],
        pipeline=Markup(pipeline_svg(timeline)),
        parts=largest_parts(memory),
        memory=Markup(memory_svg(memory, limit)),
        limit=f"{limit / GB:.0f} GB" if limit else "",
    )
