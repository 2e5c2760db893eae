"""agreement: the summary gives one answer, and the reasoning came to the same (DeepSeek-R1 report, section 2.3.1: the
summary sums up the reasoning)."""

from __future__ import annotations

import re
from decimal import Decimal

from megatron_r1.data.prepare.number_forms import plain_numbers
from megatron_r1.data.prompts.worked import boxed_answers
from megatron_r1.recipe.candidate import Candidate
from megatron_r1.recipe.plain_text import signed_words
from megatron_r1.rewards.exact import read_quantity
from megatron_r1.rewards.extract import answer_elements, any_answer, split_reasoning
from megatron_r1.rewards.last_value import last_value
from megatron_r1.rewards.quantity import same_quantity

_STATEMENT = re.compile(
    r"\banswer\s{1,3}(?:is|must be|should be)\b|\banswer\s{0,3}[=:]|"
    r"\u7b54\u6848(?:\u662f|\u4e3a|\u5e94\u4e3a|[:\uff1a])",
    re.IGNORECASE,
)
"""Words that give an answer for good, which "the result is" of a step does not."""
LONGEST_ANSWER = 400
"""Characters of a statement."""
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_PLAIN = re.compile(rf"[^\d/\\^]*({_NUMBER.pattern})[^\d/\\^]*")
"""One number with signs or a unit around it, and no formula."""


def disagreement(candidate: Candidate) -> str:
    """Why a response counts as contradicting itself.

    Its summary gives two numbers as the answer; or its reasoning ends with another number as the answer; or the number
    that the summary gives occurs nowhere in the reasoning. Answers that are no numbers are not compared.
    """
    parts = split_reasoning(candidate.response)
    answers = [*answer_elements(parts.summary), *boxed_answers(parts.summary), *_stated(parts.summary)]
    for other in answers[1:]:
        if _differ(answers[0], other):
            return f"its summary gives the answers {answers[0]} and {other}"
    answer = answers[0] if answers else any_answer(parts.summary)
    if not answer or not parts.reasoning.strip():
        return ""
    concluded = boxed_answers(parts.reasoning)[-1:] or _stated(parts.reasoning)
    if concluded and _differ(answer, concluded[-1]):
        return f"its reasoning comes to {concluded[-1]}, its summary gives {answer}"
    if not concluded and not _occurs(answer, parts.reasoning):
        return f"the answer {answer} of its summary does not occur in its reasoning"
    return ""


def _stated(text: str) -> list[str]:
    """What the last statement of an answer gives; nothing without one."""
    statements = list(_STATEMENT.finditer(text))[-1:]
    values = (last_value(text[each.start() : each.start() + LONGEST_ANSWER]) for each in statements)
    return [value for value in values if value]


def _differ(first: str, second: str) -> bool:
    one, other = read_quantity(first), read_quantity(second)
    return one is not None and other is not None and not same_quantity(one, other)


def _occurs(answer: str, reasoning: str) -> bool:
    """Whether a plain number occurs in the reasoning, also as a percentage or without its sign; true of all else."""
    plain = _PLAIN.fullmatch(plain_numbers(answer))
    if not plain or read_quantity(answer) is None:
        return True
    value = Decimal(plain[1])
    spelt = {f"{number.normalize():f}" for number in (value, 100 * value, value / 100)}
    if not spelt.isdisjoint(_NUMBER.findall(reasoning)):
        return True
    numbers = {word for word in signed_words(reasoning) if word[0].isdecimal()}
    return not numbers or not spelt.isdisjoint(numbers)
