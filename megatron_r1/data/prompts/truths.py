"""The true answer of a row: its answer field, what a pattern or a function finds, or the end of a worked solution."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

import orjson

from megatron_r1.config.data import PromptsConfig
from megatron_r1.data.prompts.worked import MARK, boxed_answers, marked_answer
from megatron_r1.data.user_function import load_function

OBJECT_TASKS = ("code", "reasoning_gym:")
"""How tasks begin whose truth may be a JSON object or list."""
WHOLE_TASKS = (*OBJECT_TASKS, "text")
"""How tasks begin whose truth is all of the field, whatever it looks like."""
EXACT_INTEGERS = 2**53
"""JSON numbers from here on lost digits when they were read."""
OTHER = "data.prompts.answer_pattern or data.prompts.answer_function chooses"


class TruthReader:
    """Reads true answers as one configuration says."""

    def __init__(self, config: PromptsConfig):
        """Raises ConfigError: the user's function cannot be loaded."""
        self._config, self._pattern = config, re.compile(config.answer_pattern)
        function = config.answer_function
        self._function = load_function(function, "data.prompts.answer_function") if function else None
        self._counts: Counter[str] = Counter()

    @property
    def notes(self) -> list[str]:
        """What was done to how many rows."""
        return [f"{count} rows: {note}" for note, count in self._counts.items()]

    def truth(self, row: Mapping[str, Any], task: str) -> str:
        """The true answer as text; empty where the row has none.

        Raises:
            ValueError: why none can be read.
        """
        if self._function is not None:
            return self._of_function(row)
        value = row.get(self._config.answer_field)
        if isinstance(value, dict | list) and task.startswith(OBJECT_TASKS):
            return orjson.dumps(value).decode()
        text = self._spelt_out(value)
        if self._config.answer_pattern and text:
            return self._of_pattern(text)
        return text if task.startswith(WHOLE_TASKS) else self._of_solution(text)

    def _of_function(self, row: Mapping[str, Any]) -> str:
        try:
            found = self._function(dict(row))  # type: ignore[misc]
        except Exception as error:
            raise ValueError(f"data.prompts.answer_function raised {type(error).__name__}: {error}") from error
        if not isinstance(found, str | int | float) or isinstance(found, bool):
            raise ValueError(f"data.prompts.answer_function returned {found!r}, which is neither text nor a number")
        return self._spelt_out(found)

    def _of_pattern(self, text: str) -> str:
        matches = list(self._pattern.finditer(text))
        if not matches:
            raise ValueError(f"data.prompts.answer_pattern does not match its {self._config.answer_field}")
        match = matches[-1]
        return str(match[1 if match.re.groups else 0] or "").strip()

    def _of_solution(self, text: str) -> str:
        if (marked := marked_answer(text)) is not None:
            self._counts[f"the true answer is what follows {MARK} in a worked solution; {OTHER} another"] += (
                marked != text
            )
            return marked
        boxes = dict.fromkeys(boxed_answers(text))
        if len(boxes) > 1:
            raise ValueError(f"its answer has {len(boxes)} boxes that differ; {OTHER} one")
        if boxes:
            self._counts[f"the true answer is what stands in the box of a worked solution; {OTHER} another"] += 1
        return next(iter(boxes), text)

    def _spelt_out(self, value: Any) -> str:
        """Text as it is, a number in digits: 0.0000001, not 1e-07."""
        if value is None:
            return ""
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise ValueError(f"{self._config.answer_field} is neither text nor a number")
        if not isinstance(value, float):
            return str(value)
        if abs(value) >= EXACT_INTEGERS:
            raise ValueError(
                f"{self._config.answer_field} {value!r} has lost digits as a JSON number; write it as text"
            )
        if "e" not in repr(value):
            return repr(value)
        self._counts["the true answer is a number with an exponent, which is spelt out"] += 1
        return f"{Decimal(repr(value)):f}"
