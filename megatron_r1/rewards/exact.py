"""Exact comparison of an answer with the truth: as numbers, as text, as the letter of a choice."""

from __future__ import annotations

import re
from fractions import Fraction

MAX_NUMBER_CHARACTERS = 64
"""Longer answers count as wrong without being parsed, which bounds the time for an answer."""
_WHOLE, _FRACTION = r"[-+]?[0-9]+(?:,[0-9]{3})*", r"(?:/[0-9]+)?"
NUMBER = re.compile(rf"{_WHOLE}(?:\.[0-9]+)?{_FRACTION}")
"""A number inside a text: the full stop of a sentence is no part of it."""
WHOLE_TEXT_NUMBER = re.compile(rf"{_WHOLE}(?:\.[0-9]*)?{_FRACTION}")
"""A text that is nothing but a number."""

MAX_CHOICE_CHARACTERS = 2000
CHOICE = re.compile(
    r"(?:(?:the )?(?:correct )?(?:answer|option|choice)(?: is)?[:\s]+)?"
    r"[\s(\[{$*\"']*(?:\\(?:text|mathrm|mathbf|boxed)\{)?\(?([A-Za-z])(?:\}|\)|\]|\.|:|\*|\$|\"|'|\s*$)(.*)",
    re.IGNORECASE | re.DOTALL,
)
SECOND_LETTER = re.compile(r"(?:^|[\s(,/&])(?:or|and|,|/|&)?\s*\(?[A-Z]\)?[\s).,]*$")


def parse_number(text: str) -> Fraction | None:
    """The exact value of an integer, decimal or fraction in ASCII digits; None for any other text.

    Spaces around it, a `$...$` pair, one final full stop and commas between thousands are allowed.
    """
    plain = text.strip()
    if len(plain) > MAX_NUMBER_CHARACTERS:
        return None
    plain = plain.strip("$").strip().removesuffix("\u3002").removesuffix(".")
    if not WHOLE_TEXT_NUMBER.fullmatch(plain):
        return None
    numerator, _, denominator = plain.replace(",", "").partition("/")
    divisor = int(denominator or 1)
    return Fraction(numerator) / divisor if divisor else None


def same_number(answer: str, truth: str) -> bool:
    """Whether two texts are numerically equal, as 14 and 14.0 are."""
    value = parse_number(answer)
    return value is not None and value == parse_number(truth)


def same_text(answer: str, truth: str) -> bool:
    """Whether two texts are equal, except for the amount of white space."""
    return answer.split() == truth.split()


def chosen_letter(answer: str) -> str | None:
    """The letter of a choice: B for B, (b), B., "B) Paris", "the answer is B"; None where there is no single letter."""
    match = CHOICE.fullmatch(answer.strip()[:MAX_CHOICE_CHARACTERS])
    if match is None or SECOND_LETTER.search(match.group(2)):
        return None
    return match.group(1).upper()


def same_choice(answer: str, truth: str) -> bool:
    """Whether two answers name the same choice."""
    letter = chosen_letter(answer)
    return letter is not None and letter == chosen_letter(truth)
