"""The report of a recipe: one self-contained HTML page.

Text from models and files is shown, never interpreted: templates escape everything except the figures, which are made
here. Missing parts are named as missing.
"""

from __future__ import annotations

from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from megatron_r1.report.graph import duration, graph_svg
from megatron_r1.report.read import Recipe, Stage, read_recipe, read_stage
from megatron_r1.report.recipe import data_tables, settings_table, stage_tables, time_table
from megatron_r1.report.results import accuracy_of, evaluation_of, responses_of
from megatron_r1.report.stages import Figure, figures_beside, figures_of, figures_over_training
from megatron_r1.report.times import times_of

# Browsers load and run nothing, whatever a model may have written.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
SECTIONS = {
    "pretrain": "Pre-training",
    "sft": "Supervised fine-tuning",
    "reward_model": "Reward models",
    "preference": "Direct preference optimization",
    "rl": "Reinforcement learning",
}
ALWAYS = ("pretrain", "rl")
"""Sections that the page has even without such stages."""
JUDGES = {"reward_model": "reward model", "preference": "implicit reward"}
"""Kind of stage -> name of what orders, or labels, its held-out examples."""


def write_report(pipeline_folder: Path, out: Path) -> None:
    """Writes the page of the recipe that ran in `pipeline_folder` to `out`, replacing it as a whole."""
    page = render(read_recipe(pipeline_folder))
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_name(out.name + ".tmp")
    unfinished.write_text(page, "utf-8", errors="replace")
    unfinished.replace(out)


def render(recipe: Recipe) -> str:
    """The page, from `templates/page.html`."""
    kinds = [kind for kind in SECTIONS if kind in ALWAYS or recipe.of_kind(kind)]
    return (
        _environment()
        .get_template("page.html")
        .render(
            policy=POLICY,
            recipe=recipe,
            written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            graph=graph_svg(recipe.pipeline),
            times=time_table(recipe),
            settings=settings_table(recipe),
            stage_tables=stage_tables(recipe),
            datasets=data_tables(recipe),
            over_training=[
                figure for each in recipe.evaluations for figure in figures_over_training(each.name, each.results)
            ],
            results=evaluation_of(recipe.comparison.results),
            sections=[_section(recipe, kind) for kind in kinds],
            responses=responses_of(recipe.comparison.samples, list(recipe.comparison.models)),
            has_settings=any(stage.config or stage.environment for stage in recipe.stages),
        )
    )


def _section(recipe: Recipe, kind: str) -> dict[str, Any]:
    stages = recipe.of_kind(kind)
    return {
        "title": SECTIONS[kind],
        "beside": figures_beside(kind, stages),
        "stages": [_stage(stage) for stage in stages],
    }


def _stage(stage: Stage) -> dict[str, Any]:
    return {
        "name": stage.name,
        "rows": len(stage.rows),
        "last": stage.rows[-1]["step"],
        "figures": _drawn(stage.folder, stage.stamp),
        "times": times_of(stage.rows),
        "accuracy": accuracy_of(stage.accuracy, JUDGES[stage.kind]) if stage.kind in JUDGES else {"shares": []},
    }


@lru_cache(64)
def _drawn(folder: Path, stamp: tuple[int, int]) -> list[Figure]:
    """The figures of a stage; a recipe writes its page after every stage, and most have nothing new to draw."""
    return figures_of(read_stage(folder))


def _environment() -> Environment:
    loader = PackageLoader("megatron_r1.report")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True)
    environment.filters |= {"drawing": Markup, "percent": _percent, "size": _size, "flat": _flat, "duration": duration}
    return environment


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _flat(content: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested values by dotted names."""
    pairs = []
    for key, value in content.items():
        pairs += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", str(value))]
    return pairs


def _size(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
