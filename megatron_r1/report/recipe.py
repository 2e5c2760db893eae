"""The recipe as a whole: its stages with their settings and times, the table of all evaluations, and what filters drop.

The table is the analogue of DeepSeek-R1's table 3: one row for each evaluated model, in the order of the stages.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_r1.evaluation.intervals import Interval
from megatron_r1.report.graph import needs_of
from megatron_r1.report.read import EvaluationRun, Recipe
from megatron_r1.report.results import MEASURES, interval_of
from megatron_r1.track.metrics import find

BEHAVIOUR = ("mixed_language", "response_length", "reflection_words")
DEFAULT_BENCHMARK = "held-out prompts"


@dataclass(frozen=True)
class ResultRow:
    """One evaluated model."""

    label: str
    position: int
    """Of the stage that made the model, in the recipe."""
    benchmark: str
    values: Mapping[str, Interval]
    """Column -> value; shares where the column's unit says so."""


def stage_tables(recipe: Recipe) -> list[dict[str, Any]]:
    """A table for each benchmark, with its columns and rows; none without results."""
    rows = [row for evaluation in recipe.evaluations for row in _rows(recipe, evaluation)]
    tables = []
    for benchmark in dict.fromkeys(row.benchmark for row in rows):
        own = sorted((row for row in rows if row.benchmark == benchmark), key=lambda row: row.position)
        columns = list(dict.fromkeys(column for row in own for column in row.values))
        tables.append(
            {
                "benchmark": benchmark,
                "columns": [column.replace("_", " ") for column in columns],
                "shares": [_is_share(column) for column in columns],
                "rows": [(row.label, [row.values.get(column) for column in columns]) for row in own],
            }
        )
    return tables


def _is_share(column: str) -> bool:
    return column not in BEHAVIOUR or find(f"eval/{column}").unit == "share"


def _rows(recipe: Recipe, evaluation: EvaluationRun) -> Iterator[ResultRow]:
    order = [str(stage.get("name")) for stage in recipe.pipeline]
    benchmark = str(evaluation.results.get("benchmark", DEFAULT_BENCHMARK))
    for name, model in evaluation.models.items():
        source = _made_by(recipe, evaluation, name)
        position = order.index(source) if source in order else len(order)
        if values := _values(model):
            yield ResultRow(source, position, benchmark, values)


def _made_by(recipe: Recipe, evaluation: EvaluationRun, model: str) -> str:
    """The stage that made an evaluated model, or the evaluation's own name for it."""
    stage = next((each for each in recipe.pipeline if each.get("name") == evaluation.name), {})
    inputs = stage.get("inputs")
    if isinstance(inputs, Mapping) and model in inputs:
        return str(inputs[model]).partition(".")[0]
    needs = needs_of(stage)
    if model == "model" and needs:
        return needs[0]
    return evaluation.name if model == "model" else model


def _values(model: Mapping[str, Any]) -> dict[str, Interval]:
    """pass@1 of every metric, pass@k and cons@k of the largest k, and how responses are written; sampled responses."""
    sampled, written = _mapping(model, "sampled"), _mapping(_mapping(model, "behaviour"), "sampled")
    found = {name: sampled[name] for name in MEASURES if name in sampled}
    for title, by_k in (
        ("pass@{}", next(iter(_mapping(model, "pass_at_k").values()), {})),
        ("cons@{}", _mapping(model, "cons_at_k")),
    ):
        if isinstance(by_k, Mapping) and len(by_k) > 1:
            largest = list(by_k)[-1]
            found[title.format(largest)] = by_k[largest]
    found |= {name: written[name] for name in BEHAVIOUR if name in written}
    values = ((column, interval_of(value)) for column, value in found.items())
    return {column: value for column, value in values if value}


def _mapping(content: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = content.get(key)
    return found if isinstance(found, Mapping) else {}


def settings_table(recipe: Recipe) -> dict[str, Any]:
    """Settings of each stage that has any; columns that no stage fills are left out."""
    settings = {str(stage.get("name", "?")): _mapping(stage, "settings") for stage in recipe.pipeline}
    columns = dict.fromkeys(column for own in settings.values() for column, value in own.items() if value)
    rows = [
        (name, [str(own.get(column, "")) for column in columns]) for name, own in settings.items() if any(own.values())
    ]
    return {"columns": list(columns), "rows": rows}


def time_table(recipe: Recipe) -> list[dict[str, Any]]:
    """State, start, time and share of the whole time of each stage."""
    seconds = [_number(stage.get("seconds")) for stage in recipe.pipeline]
    longest, total = max(seconds, default=0.0), sum(seconds)
    return [
        {
            "name": str(stage.get("name", "?")),
            "state": str(stage.get("state", "?")),
            "why": str(stage.get("why") or ""),
            "started": str(stage.get("started") or ""),
            "seconds": own,
            "share": own / total if total else 0.0,
            "bar": own / longest if longest else 0.0,
        }
        for stage, own in zip(recipe.pipeline, seconds, strict=True)
    ]


def data_tables(recipe: Recipe) -> list[dict[str, Any]]:
    """Of each generated dataset: its sources, rows in and out of each filter, and what was written."""
    return [
        {
            "name": name,
            "sources": list(_sheet_rows(sheet.get("sources"), ("name", "domain", "rows"))),
            "filters": list(_sheet_rows(sheet.get("filters"), ("name", "in", "dropped", "out"))),
            "outputs": [
                (output, str(_mapping(_mapping(sheet, "outputs"), output).get("rows", "?")))
                for output in _mapping(sheet, "outputs")
            ],
        }
        for name, sheet in recipe.sheets.items()
    ]


def _sheet_rows(content: Any, keys: tuple[str, ...]) -> Iterator[list[str]]:
    for row in content if isinstance(content, list) else ():
        if isinstance(row, Mapping):
            yield [str(row.get(key, "?")) for key in keys]


def _number(content: Any) -> float:
    return float(content) if isinstance(content, int | float) and not isinstance(content, bool) else 0.0
