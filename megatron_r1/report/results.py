"""Results of evaluated models for the page: shares with their intervals, and responses to the same questions.

An incomplete share is None.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_r1.evaluation.intervals import Interval
from megatron_r1.track.metrics import METRICS, find

SHOWN_QUESTIONS = 10
WAYS = ("sampled", "greedy")
MEASURES = tuple(metric.name.removeprefix("eval/") for metric in METRICS if metric.commands == ("evaluate",))
LEADS = {"correct_any_format": "are correct", "helpful": "are as requested"}
"""Metrics for the page's first sentence, which has the first of them that was measured."""

Samples = Mapping[str, Sequence[Mapping[str, Any]]]
Models = Mapping[str, Mapping[str, Any]]


def interval_of(content: Any) -> Interval | None:
    """An interval from {mean, low, high}; None if the content is no interval."""
    if not isinstance(content, Mapping):
        return None
    mean, low, high = (content.get(key) for key in ("mean", "low", "high"))
    for number in (mean, low, high):
        if not (isinstance(number, int | float) and math.isfinite(number)):
            return None
    return Interval(float(mean), float(low), float(high))  # type: ignore[arg-type]


def evaluation_of(results: Mapping[str, Any]) -> dict[str, Any]:
    """The main sentence, the table of all models, and the table by task."""
    models = {name: model for name, model in results.get("models", {}).items() if isinstance(model, Mapping)}
    ways = [way for way in WAYS if any(way in model for model in models.values())]
    measured = [name for name in MEASURES if any(name in _of(model, way) for model in models.values() for way in ways)]
    tasks = dict.fromkeys(task for model in models.values() for task in _of(model, "by_task"))
    columns = [(way, measure) for way in ways for measure in measured]
    return {
        "models": list(models),
        "lead": _lead(models),
        "columns": [f"{measure.replace('_', ' ')}, {way}" for way, measure in columns],
        "rows": [
            (name, [interval_of(_of(model, way).get(measure)) for way, measure in columns])
            for name, model in models.items()
        ],
        "tasks": [
            (task, [interval_of(_task_share(_of(model, "by_task").get(task))) for model in models.values()])
            for task in tasks
        ],
        "prompts": results.get("prompts", "?"),
        "samples": results.get("samples", "?"),
        "meanings": [f"{name.replace('_', ' ').capitalize()}: {find(f'eval/{name}').meaning}" for name in measured],
    }


def _of(model: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = model.get(key)
    return found if isinstance(found, Mapping) else {}


def _lead(models: Models) -> dict[str, Any] | None:
    """Results of the first model and the last; None with fewer than two models."""
    if len(models) < 2:
        return None
    (first, before), (last, after) = (list(models.items())[i] for i in (0, -1))
    measure = next((name for name in LEADS if name in _of(after, "sampled")), next(iter(LEADS)))
    low, high = (interval_of(_of(model, "sampled").get(measure)) for model in (before, after))
    if low is None or high is None:
        return None
    separate = low.disjoint(high)
    return {
        "what": LEADS[measure], "first": first, "last": last, "before": low, "after": high, "separate": separate
    }  # fmt: skip


def _task_share(content: Any) -> Any:
    """The share of one task, given directly or nested by sampling method and metric."""
    for key in ("sampled", next(iter(LEADS))):
        if isinstance(content, Mapping) and "mean" not in content and key in content:
            content = content[key]
    return content


def accuracy_of(found: Mapping[str, Any], scorer: str) -> dict[str, Any]:
    """Accuracy on held-out examples, of the length baselines, and by task; no shares where nothing was measured.

    Args:
        scorer: name of what orders, or labels, the examples.
    """
    shares = {scorer: found.get("accuracy")}
    for group, title in (("length_baselines", "length alone, in {}"), ("by_task", f"{scorer}, {{}}")):
        shares |= {title.format(name): value for name, value in _of(found, group).items()}
    measured = [(name, [share]) for name, value in shares.items() if (share := interval_of(value))]
    return {"caption": f"{found.get('items', '?')} held-out examples, 95 % intervals", "shares": measured}


def responses_of(samples: Samples, order: Sequence[str]) -> dict[str, Any]:
    """The models' responses to the same questions.

    Args:
        samples: model -> rows with prompt, question, truth, response and reward parts; the page shows the first of
            several responses to a prompt.
        order: models in the order of the evaluation; other models follow.
    """
    models = [name for name in order if name in samples] + [name for name in samples if name not in order]
    if not models:
        return {"questions": [], "missing": "No responses were saved."}
    first = {name: _first_by_prompt(samples[name]) for name in models}
    common = [key for key in first[models[0]] if all(key in rows for rows in first.values())]
    questions = [
        {
            "text": str((row := first[models[0]][key]).get("question", key)),
            "truth": str(row.get("truth", "?")),
            "responses": [_response(name, first[name][key]) for name in models],
        }
        for key in common[:SHOWN_QUESTIONS]
    ]
    return {"questions": questions, "missing": "The models have no question in common."}


def _first_by_prompt(rows: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    found: dict[str, Mapping[str, Any]] = {}
    for row in rows:
        found.setdefault(str(row.get("prompt", row.get("question"))), row)
    return found


def _response(model: str, row: Mapping[str, Any]) -> dict[str, Any]:
    parts = next((row[key] for key in ("reward_parts", "parts", "reward") if isinstance(row.get(key), Mapping)), row)
    marks = [(key, parts[key]) for key in ("accuracy", "format") if isinstance(parts.get(key), int | float)]
    return {"model": model, "marks": marks, "text": str(row.get("response", ""))}
