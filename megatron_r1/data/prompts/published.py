"""Rows of published benchmarks as prompts; their fields are known as Hugging Face has them.

GSM8K (openai/gsm8k), MATH-500 (HuggingFaceH4/MATH-500), AIME (HuggingFaceH4/aime_2024, Maxwell-Jia/AIME_2024,
MathArena/aime_2025, math-ai/aime24, opencompass/AIME2025), GPQA (Idavidrein/gpqa) and HumanEval
(openai/openai_humaneval).
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from megatron_r1.config.data import PromptsConfig
from megatron_r1.errors import ConfigError

PublishedRow = dict[str, Any]
Convert = Callable[[PublishedRow], PublishedRow]
"""A published row -> one with the fields question, answer, task and, where it has one, id."""
LETTERS = "ABCD"
COMPLETE = "Complete this Python function. Answer with the whole function in one code block."
CHOOSE = "Answer with the letter of the correct option."
_QUESTION, _ANSWER = ("problem", "Problem", "question"), ("answer", "Answer", "solution", "Solution")
_ID = ("unique_id", "id", "ID", "problem_idx")


def _first(row: PublishedRow, fields: tuple[str, ...], benchmark: str) -> Any:
    """The value of the first of `fields` that the row has."""
    for field in fields:
        if row.get(field) is not None:
            return row[field]
    names = ", ".join(list(row)[:8])
    raise ValueError(f"has no field {' or '.join(fields)}, so it is no row of {benchmark}: it has the fields {names}")


def _worked_problem(task: str, benchmark: str, row: PublishedRow) -> PublishedRow:
    """A problem with its answer, or with a solution that ends in one."""
    found = {
        "question": _first(row, _QUESTION, benchmark),
        "answer": _first(row, _ANSWER, benchmark),
        "task": task,
    }
    ids = [row[field] for field in _ID if row.get(field) is not None]
    return found | ({"id": ids[0]} if ids else {})


def _multiple_choice(seed: int, row: PublishedRow) -> PublishedRow:
    """A question with its four options, in an order that depends on the seed and the question alone."""
    question = str(_first(row, ("Question",), "GPQA")).strip()
    correct = _first(row, ("Correct Answer",), "GPQA")
    options = [correct, *(_first(row, (f"Incorrect Answer {number}",), "GPQA") for number in (1, 2, 3))]
    order = random.Random(f"gpqa {seed} {question}").sample(range(4), 4)
    lines = [f"{letter}) {str(options[index]).strip()}" for letter, index in zip(LETTERS, order, strict=True)]
    found = {
        "question": "\n".join([question, "", *lines, "", CHOOSE]),
        "answer": LETTERS[order.index(0)],
        "task": "choice",
    }
    return found | ({"id": row["Record ID"]} if row.get("Record ID") else {})


def _function(row: PublishedRow) -> PublishedRow:
    """A function to complete, and its tests; they may call what the prompt defines beside it."""
    prompt, test, entry_point = (_first(row, (field,), "HumanEval") for field in ("prompt", "test", "entry_point"))
    tests = {
        "language": "python",
        "entry_point": entry_point,
        "setup": prompt,
        "tests": [f"{test}\n\ncheck({entry_point})\n"],
    }
    found = {"question": f"{COMPLETE}\n\n{prompt}", "answer": json.dumps(tests), "task": "code"}
    return found | ({"id": row["task_id"]} if row.get("task_id") else {})


PUBLISHED: Mapping[str, Callable[[int], Convert]] = {
    "gsm8k": lambda seed: partial(_worked_problem, "number", "GSM8K"),
    "math500": lambda seed: partial(_worked_problem, "math", "MATH-500"),
    "aime": lambda seed: partial(_worked_problem, "number", "AIME"),
    "gpqa": lambda seed: partial(_multiple_choice, seed),
    "humaneval": lambda seed: _function,
}
"""Benchmark -> seed of the order of options -> how its rows become prompts."""


def with_known_fields(config: PromptsConfig, benchmark: str) -> PromptsConfig:
    """The configuration that reads converted rows.

    Raises:
        ConfigError: there is no file, or a field is configured: it would have no effect.
    """
    if not config.path:
        allowed = f"must name the file with evaluate.benchmark={benchmark}: nothing is downloaded"
        raise ConfigError("data.prompts.path", config.path, allowed)
    for name in ("question_field", "answer_field", "answer_pattern", "answer_function", "task_field", "id_field"):
        value, default = getattr(config, name), getattr(PromptsConfig(), name)
        if value != default:
            allowed = f"must stay {default!r}: evaluate.benchmark={benchmark} knows the fields of its rows"
            raise ConfigError(f"data.prompts.{name}", value, allowed)
    return replace(config, id_field="id")
