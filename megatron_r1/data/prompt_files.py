"""Prompts out of a user's file, JSONL or Parquet: bad rows are named, never silently dropped."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_r1.config.sample import SampleConfig
from megatron_r1.data.prompts import Prompt
from megatron_r1.data.row_files import rows_of
from megatron_r1.data.template import fill_template
from megatron_r1.errors import ConfigError, DataError

TASK = "file"
"""Task of a prompt that no world made: its answer is judged as reward.verifier says."""


@dataclass(frozen=True)
class PromptFile:
    """What a file holds."""

    prompts: list[Prompt]
    bad_rows: list[str]
    """file:row: reason."""


def read_prompts(config: SampleConfig) -> PromptFile:
    """The prompts of `config.prompts`, in order.

    Raises:
        ConfigError: the file is of no known kind.
        DataError: it cannot be read, two rows have one name, or more rows are bad than are allowed.
    """
    path, seen = Path(config.prompts), set[str]()
    prompts: list[Prompt] = []
    bad: list[str] = []
    if path.suffix not in (".jsonl", ".parquet"):
        raise ConfigError("sample.prompts", path, "must end in .jsonl or .parquet")
    for number, row in enumerate(rows_of(path), start=1):
        if config.limit and len(prompts) == config.limit:
            break
        try:
            prompt = _prompt(row, number, config)
            if prompt.id in seen:
                raise ValueError(f"{config.id_field} {prompt.id} has been seen before")
        except ValueError as error:
            bad.append(f"{path.name}:{number}: {error}")
            if len(bad) > config.max_bad_rows:
                raise DataError(f"{bad[-1]}; sample.max_bad_rows={config.max_bad_rows} may be bad") from None
            continue
        seen.add(prompt.id)
        prompts.append(prompt)
    if not prompts:
        raise DataError(f"{path}: holds no prompts")
    return PromptFile(prompts, bad)


def _prompt(row: Any, number: int, config: SampleConfig) -> Prompt:
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
    text = fill_template(question) if config.template == "r1_zero" else question
    return Prompt(str(name), question, "" if answer is None else str(answer), text, "", task)
