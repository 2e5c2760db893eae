"""The evaluated models on the page: shares with their intervals, and answers side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from megatron_r1.evaluation.intervals import Interval

SHOWN_QUESTIONS = 10
WAYS = {"sampled": "sampled", "greedy": "greedy"}
MEASURES = {
    "correct_any_format": "right",
    "correct_tagged": "right and tagged",
    "helpful": "as asked",
    "safe": "safe",
    "format": "well-formed",
}
MEANINGS = {
    "correct_any_format": "Right: the answer is right wherever it stands.",
    "correct_tagged": "Right and tagged: it stands in the answer tags.",
    "helpful": "As asked: it does what was asked, or declines what is harmful, by rules that no training saw.",
    "safe": "Safe: nothing in it, reasoning included, goes about something harmful.",
    "format": "Well-formed: reasoning and answer are each in their tags.",
}
LEADS = {"correct_any_format": "are right", "helpful": "are as asked"}
"""What the page's first sentence is about: the first of these that was measured."""

Samples = Mapping[str, Sequence[Mapping[str, Any]]]


def missing(sentence: str) -> str:
    return f'<p class="missing">{escape(sentence)}</p>'


def interval_of(content: Any) -> Interval | None:
    """A share with its bounds from {mean, low, high}; None if it is not one."""
    if not isinstance(content, Mapping):
        return None
    numbers = [content.get(key) for key in ("mean", "low", "high")]
    if not all(isinstance(number, (int, float)) and math.isfinite(number) for number in numbers):
        return None
    return Interval(*map(float, numbers))  # type: ignore[arg-type]


def headline(results: Mapping[str, Any]) -> str:
    """The sentence that matters, the table of all models, and the table by task."""
    models = {name: model for name, model in results.get("models", {}).items() if isinstance(model, Mapping)}
    if not models:
        return missing("No model has been evaluated.")
    ways = [way for way in WAYS if any(way in model for model in models.values())]
    measured = [
        name for name in MEASURES if any(name in (model.get(way) or {}) for model in models.values() for way in ways)
    ]
    columns = [(way, measure) for way in ways for measure in measured]
    header = "<th>model</th>" + "".join(f"<th>{MEASURES[measure]}, {WAYS[way]}</th>" for way, measure in columns)
    rows = "".join(
        f"<tr><td>{escape(name)}</td>"
        + "".join(_cell((model.get(way) or {}).get(measure)) for way, measure in columns)
        + "</tr>"
        for name, model in models.items()
    )
    prompts, samples = escape(str(results.get("prompts", "?"))), escape(str(results.get("samples", "?")))
    note = (
        f"{prompts} held-out prompts; {samples} sampled answers and one greedy answer to each. In brackets: 95 % "
        "intervals over prompts. " + " ".join(MEANINGS[measure] for measure in measured)
    )
    return f'{_sentence(models)}{_table(header, rows)}<p class="dim">{note}</p>{_by_task(models)}'


def _table(header: str, rows: str) -> str:
    return f'<div class="wide"><table><thead><tr>{header}</tr></thead><tbody>{rows}</tbody></table></div>'


def _sentence(models: Mapping[str, Mapping[str, Any]]) -> str:
    (first, before), (last, after) = (list(models.items())[i] for i in (0, -1))
    lead = next((name for name in LEADS if name in (after.get("sampled") or {})), "correct_any_format")
    low, high = (interval_of((model.get("sampled") or {}).get(lead)) for model in (before, after))
    if first == last or low is None or high is None:
        return ""
    apart = "do not overlap" if low.disjoint(high) else "overlap"
    return (
        f'<p class="lead">Sampled answers {LEADS[lead]} in {_percent(low.mean)} of cases before ({escape(first)}) and '
        f"in {_percent(high.mean)} after ({escape(last)}): {100 * (high.mean - low.mean):+.1f} points. "
        f"The 95 % intervals {apart}.</p>"
    )


def _by_task(models: Mapping[str, Mapping[str, Any]]) -> str:
    tasks = {task: None for model in models.values() for task in (model.get("by_task") or {})}
    if not tasks:
        return ""
    header = "<th>task</th>" + "".join(f"<th>{escape(name)}</th>" for name in models)
    rows = "".join(
        f"<tr><td>{escape(task)}</td>"
        + "".join(_cell(_task_share((model.get("by_task") or {}).get(task))) for model in models.values())
        + "</tr>"
        for task in tasks
    )
    return "<h3>By task</h3>" + _table(header, rows)


def _task_share(content: Any) -> Any:
    """The share of one task, which may be given alone or among ways and measures."""
    for key in ("sampled", "correct_any_format"):
        if isinstance(content, Mapping) and "mean" not in content and key in content:
            content = content[key]
    return content


def _cell(content: Any) -> str:
    share = interval_of(content)
    if share is None:
        return '<td><span class="missing">missing</span></td>'
    return f'<td>{_percent(share.mean)} <span class="dim">({100 * share.low:.1f} to {100 * share.high:.1f})</span></td>'


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def answers(samples: Samples, order: Sequence[str]) -> str:
    """The models' answers to the same questions, next to each other.

    Args:
        samples: model -> rows with prompt, question, truth, response and reward parts; of several answers to a prompt
            the first is shown.
        order: models in the order of the evaluation; others follow.
    """
    models = [name for name in order if name in samples] + [name for name in samples if name not in order]
    first_answers = {name: _first_by_prompt(samples[name]) for name in models}
    if not models:
        return missing("No answers have been kept.")
    common = [key for key in first_answers[models[0]] if all(key in rows for rows in first_answers.values())]
    if not common:
        return missing("The models have not answered the same questions.")
    blocks = [f'<p class="dim">The first {min(len(common), SHOWN_QUESTIONS)} held-out questions, not a selection.</p>']
    for key in common[:SHOWN_QUESTIONS]:
        row = first_answers[models[0]][key]
        question, truth = escape(str(row.get("question", key))), escape(str(row.get("truth", "?")))
        cards = "".join(_answer(name, first_answers[name][key]) for name in models)
        heading = f'<h3>{question} <span class="dim">(answer: {truth})</span></h3>'
        blocks.append(f'{heading}<div class="answers">{cards}</div>')
    return "".join(blocks)


def _first_by_prompt(rows: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    found: dict[str, Mapping[str, Any]] = {}
    for row in rows:
        found.setdefault(str(row.get("prompt", row.get("question"))), row)
    return found


def _answer(name: str, row: Mapping[str, Any]) -> str:
    parts = next((row[key] for key in ("reward_parts", "parts", "reward") if isinstance(row.get(key), Mapping)), row)
    marks = []
    for key in ("accuracy", "format"):
        if isinstance(value := parts.get(key), (int, float)):
            marks.append(f'<span class="{"right" if value > 0 else "wrong"}">{key} {value:g}</span>')
    response = escape(str(row.get("response", "")))
    header = f"<header><strong>{escape(name)}</strong><span>{' '.join(marks)}</span></header>"
    return f'<div class="answer">{header}<pre>{response}</pre></div>'
