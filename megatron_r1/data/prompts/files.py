"""Reads prompts from a user's files; bad rows are listed, never silently dropped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from operator import attrgetter
from typing import Any

from megatron_r1.config.data import PromptsConfig
from megatron_r1.config.reward import DOMAINS
from megatron_r1.data.prompts.prompts import REASONING, Prompt
from megatron_r1.data.prompts.truths import TruthReader
from megatron_r1.data.row_files import as_object, rows_of
from megatron_r1.data.row_sources import RowSource
from megatron_r1.errors import DataError

TASK = "file"
"""Task of a prompt from a file whose row names none: `reward.verifier` decides how its answer is verified."""


@dataclass(frozen=True)
class PromptFile:
    """The prompts of a file, and its bad rows."""

    prompts: list[Prompt]
    bad_rows: list[str]
    """file:row: reason."""
    left_out: list[str] = field(default_factory=list)
    """file:row: why a prompt is none of them by its pass rate."""
    notes: list[str] = field(default_factory=list)
    """What was read otherwise than it stands in the file, and fields that nothing reads."""


TruthProblems = Callable[[Sequence[Prompt]], Sequence[str]]
"""Prompts -> for each why no response to it could be correct; empty where one can."""


def read_prompts(
    config: PromptsConfig,
    check: Callable[[str], None],
    limit: int = 0,
    truth_problems: TruthProblems | None = None,
    convert: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    request: Callable[[Prompt], str] = attrgetter("question"),
    response_field: str = "",
) -> PromptFile:
    """The prompts of `config.path`, in order.

    Args:
        check: raises ValueError for a request that cannot be a prompt.
        limit: rows to read, from the first that can be a prompt; 0 reads all.
        truth_problems: what the verifiers say of the true answers; None where no reward reads them.
        convert: makes a row with the configured fields of one with others, or raises ValueError; None takes rows as
            they are.
        request: the user's message that asks a prompt's question.
        response_field: field of a row with a response that the request shows; empty reads none.

    Raises:
        ConfigError: there is no file.
        DataError: the file cannot be read, or more rows are bad than are allowed.
    """
    ids, truths = set[str](), TruthReader(config)
    good: dict[str, Prompt] = {}
    bad: list[str] = []
    left_out: list[str] = []
    unread: Counter[str] = Counter()
    for location, id, row in rows_of(RowSource.of(config, "data.prompts").files()):
        if limit and len(good) == limit:
            break
        try:
            row = convert(as_object(row)) if convert else as_object(row)
            prompt = _prompt(row, id, config, truths, response_field)
            if truth_problems and not prompt.answer and prompt.domain == REASONING:
                raise ValueError(_no_answer(row, config))
            check(request(prompt))
            if prompt.id in ids:
                raise ValueError(f"{config.id_field} {prompt.id} is not unique")
            outside = outside_of_pass_rates(row, config)
        except ValueError as error:
            _add_bad(bad, f"{location}: {error}", config)
            continue
        ids.add(prompt.id)
        if outside:
            left_out.append(f"{location}: {outside}")
            continue
        good[location] = prompt
        unread.update(row.keys() - read_fields(config) - {response_field})
    problems = truth_problems(list(good.values())) if truth_problems else ()
    for location, problem in zip(list(good), problems, strict=False):
        if problem:
            _add_bad(bad, f"{location}: {problem}", config)
            del good[location]
    if not good:
        outside = f"; {len(left_out)} were left out by their pass rates" if left_out else ""
        raise DataError(f"{config.path}: holds no prompts{outside}")
    notes = truths.notes + ([] if config.answer_function else list(_unread_note(unread)))
    return PromptFile(list(good.values()), bad, left_out, notes)


def read_fields(config: PromptsConfig) -> set[str]:
    """Fields of a row that something reads."""
    names = "question_field", "answer_field", "task_field", "id_field", "reward_domain_field", "pass_rate_field"
    return {getattr(config, name) for name in names}


def outside_of_pass_rates(row: dict[str, Any], config: PromptsConfig) -> str:
    """Why the row's pass rate excludes it; empty where it does not, or where there is none.

    Raises:
        ValueError: the pass rate is no share.
    """
    field = config.pass_rate_field
    if (rate := row.get(field)) is None:
        return ""
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate <= 1:
        raise ValueError(f"{field} is no number from 0 to 1")
    if rate < config.min_pass_rate:
        return f"{field} {rate:g} is below min_pass_rate={config.min_pass_rate:g}"
    return f"{field} {rate:g} is above max_pass_rate={config.max_pass_rate:g}" if rate > config.max_pass_rate else ""


def _add_bad(bad: list[str], line: str, config: PromptsConfig) -> None:
    bad.append(line)
    if len(bad) > config.max_bad_rows:
        raise DataError(f"{line}; data.prompts.max_bad_rows={config.max_bad_rows} may be bad")


def _prompt(row: dict[str, Any], id: str, config: PromptsConfig, truths: TruthReader, response_field: str) -> Prompt:
    question = row.get(config.question_field)
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"{config.question_field} is not text{_fields_instead(row, config)}")
    task = TASK if row.get(config.task_field) is None else row[config.task_field]  # tables fill gaps with None
    if not isinstance(task, str):
        raise ValueError(f"{config.task_field} is not text")
    domain = config.reward_domain or row.get(config.reward_domain_field) or REASONING
    if domain not in DOMAINS:
        raise ValueError(f"{config.reward_domain_field} must be one of {', '.join(DOMAINS)}")
    name = row.get(config.id_field, id) if config.id_field else id
    response = row.get(response_field) if response_field else ""
    if not isinstance(response, str) or (response_field and not response.strip()):
        raise ValueError(f"{response_field} is not text, and the prompt style shows it")
    return Prompt(str(name), question, truths.truth(row, task).strip(), "", task, response, domain)


def _fields_instead(row: dict[str, Any], config: PromptsConfig) -> str:
    """What to do about a row that has other fields than the configured ones."""
    if config.question_field in row or not row:
        return ""
    keys = "data.prompts.question_field and data.prompts.answer_field"
    return f": the row has the fields {', '.join(islice(row, 8))}; {keys} name those to read"


def _no_answer(row: dict[str, Any], config: PromptsConfig) -> str:
    named = (config.answer_function and "data.prompts.answer_function") or f"field {config.answer_field}"
    rest = "data.prompts.answer_field names it; reward.accuracy=0 samples without true answers"
    return f"has no true answer by {named}: the row has the fields {', '.join(islice(row, 8))}; {rest}"


def _unread_note(unread: Counter[str]) -> Iterator[str]:
    if names := sorted(filter(None, unread)):
        yield f"nothing reads the fields {', '.join(names[:12])}"
