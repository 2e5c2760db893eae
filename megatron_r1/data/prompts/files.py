"""Reads prompts from a user's JSONL or Parquet file; bad rows are listed, never silently dropped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_r1.config.data import PromptsConfig
from megatron_r1.data.prompts.prompts import Prompt
from megatron_r1.data.row_files import rows_of
from megatron_r1.errors import ConfigError, DataError

TASK = "file"
"""Task of a prompt from a file whose row names none: `reward.verifier` decides how its answer is verified."""


@dataclass(frozen=True)
class PromptFile:
    """The prompts of a file, and its bad rows."""

    prompts: list[Prompt]
    bad_rows: list[str]
    """file:row: reason."""


def read_prompts(config: PromptsConfig, check: Callable[[str], None], limit: int = 0) -> PromptFile:
    """The prompts of `config.path`, in order.

    Args:
        check: raises ValueError for a question that cannot be a prompt.
        limit: prompts to read, from the first; 0 reads all.

    Raises:
        ConfigError: there is no file.
        DataError: the file cannot be read, two rows have the same id, or more rows are bad than are allowed.
    """
    path, seen = Path(config.path), set[str]()
    prompts: list[Prompt] = []
    bad: list[str] = []
    if not path.is_file():
        raise ConfigError("data.prompts.path", path, "there is no such file")
    for number, row in enumerate(rows_of(path), start=1):
        if limit and len(prompts) == limit:
            break
        try:
            prompt = _prompt(row, number, config)
            check(prompt.question)
            if prompt.id in seen:
                raise ValueError(f"{config.id_field} {prompt.id} is not unique")
        except ValueError as error:
            bad.append(f"{path.name}:{number}: {error}")
            if len(bad) > config.max_bad_rows:
                raise DataError(f"{bad[-1]}; data.prompts.max_bad_rows={config.max_bad_rows} may be bad") from None
            continue
        seen.add(prompt.id)
        prompts.append(prompt)
    if not prompts:
        raise DataError(f"{path}: holds no prompts")
    return PromptFile(prompts, bad)


def _prompt(row: Any, number: int, config: PromptsConfig) -> Prompt:
    if isinstance(row, ValueError):
        raise row
    if not isinstance(row, dict):
        raise ValueError("is not a JSON object")
    question = row.get(config.question_field)
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"{config.question_field} is not text")
    answer = row.get(config.answer_field)
    if answer is not None and not isinstance(answer, str | int | float):
        raise ValueError(f"{config.answer_field} is neither text nor a number")
    task = row.get(config.task_field, TASK)
    if not isinstance(task, str):
        raise ValueError(f"{config.task_field} is not text")
    name = row.get(config.id_field, number) if config.id_field else number
    return Prompt(str(name), question, "" if answer is None else str(answer), "", task)
