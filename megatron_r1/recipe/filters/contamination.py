"""contamination: no row shares ten words in a row with an evaluation prompt (DeepSeek-R1's evaluation: 10-grams), in
whatever format its numbers are, nor is one a held-out prompt of the generated worlds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from megatron_r1.config.curate import HeldOutConfig
from megatron_r1.data.prepare.decontaminate import Evaluation, NgramIndex
from megatron_r1.data.row_files import as_object, rows_of
from megatron_r1.data.synthetic.assistant import tasks
from megatron_r1.data.synthetic.expressions import in_eval_split, world
from megatron_r1.data.synthetic.gym import TASKS as GYM_TASKS
from megatron_r1.errors import DataError
from megatron_r1.recipe.candidate import Candidate
from megatron_r1.recipe.plain_text import signed_text, signed_words
from megatron_r1.recipe.sources import held_out_source

ARITHMETIC_TASKS = ("family", *GYM_TASKS)


class Contamination:
    """Finds candidates that hold what is held out."""

    def __init__(self, evaluations: Sequence[Evaluation], ngram: int, held_out_by_world: Callable[[Candidate], str]):
        """
        Args:
            held_out_by_world: why a candidate is held out by a generated world; empty where it is not.
        """
        self._index = NgramIndex(evaluations, ngram, signed_text)
        short = set(self._index.too_short)
        self._whole = {signed_text(each.text): each.name for each in evaluations if each.name in short}
        self._by_world = held_out_by_world

    def __call__(self, candidates: Sequence[Candidate]) -> list[str]:
        """Why each is dropped."""
        texts = [(*(message["content"] for message in each.before), each.response) for each in candidates]
        owners = [index for index, parts in enumerate(texts) for _ in parts]
        found = self._index.matches([text for parts in texts for text in parts])
        reasons = {owners[position]: reason for position, reason in found.items()}
        return [reasons.get(index) or self._other(candidate) for index, candidate in enumerate(candidates)]

    def _other(self, candidate: Candidate) -> str:
        if name := self._whole.get(signed_text(candidate.question)):
            return f"its question is {name}"
        return self._by_world(candidate)


def read_evaluations(config: HeldOutConfig) -> Iterator[Evaluation]:
    """The evaluation texts of the configured files.

    Raises:
        ConfigError: a path names no rows.
        DataError: a file cannot be read, or a row has none of the fields.
    """
    for path in config.paths:
        for location, _, row in rows_of(held_out_source(path, config).files()):
            try:
                fields = as_object(row)
                texts = {name: fields[name] for name in config.fields if isinstance(fields.get(name), str)}
            except ValueError as error:
                raise DataError(f"{location}: {error}") from error
            if not texts:
                raise DataError(f"{location}: has none of the fields {', '.join(config.fields)} as text")
            yield from (Evaluation(f"{location} ({name})", text) for name, text in texts.items())


def held_out_by_world(candidate: Candidate, eval_fraction: float) -> str:
    """Why a candidate is held out by a generated world: its question is, or an expression in its question.

    In responses, only those to the arithmetic world's own tasks may not hold such an expression: others work with small
    numbers too.
    """
    if candidate.task in tasks.TASKS and tasks.in_eval_split(candidate.question, eval_fraction):
        return "its question is held out by the assistant world"
    for text in (candidate.question, candidate.response if candidate.task in ARITHMETIC_TASKS else ""):
        for expression in expressions_in(signed_words(text)):
            if in_eval_split(expression, eval_fraction):
                return f"the arithmetic world holds out {expression}"
    return ""


def expressions_in(words: Sequence[str]) -> Iterator[str]:
    """The expressions of the arithmetic world among words, those inside a longer expression excepted."""
    signs = ("+", "-", "*", "/", "^")
    for start in range(len(words) - 4):
        if not (len(words[start]) == 1 and words[start].isdecimal() and words[start + 1] in signs):
            continue
        before, after = words[start - 1] if start else "", words[start + 5] if start + 5 < len(words) else ""
        expression = " ".join(words[start : start + 5])
        if len(expression) == 9 and expression in world() and before not in signs and after not in signs:
            yield expression
