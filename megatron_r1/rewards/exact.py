"""Exact comparison of an answer with the truth: as numbers, as text, as the letter of a choice."""

from __future__ import annotations

import re
from functools import lru_cache

from megatron_r1.rewards.normalise import normalised
from megatron_r1.rewards.quantity import Quantity, parse_quantity, same_quantity

MAX_TEXT_CHARACTERS = 2000
"""Longer answers are no choice and no number: they count as wrong without being read."""
LATEX_SIGNS = re.compile(r"\\[$%,;! ]")
CHOICE = re.compile(
    r"[*_]*(?:(?:the )?(?:final |correct |right )*(?:answer|option|choice)(?: is)?[:\s*]+|"
    r"(?:\u7b54\u6848[\u662f\u4e3a:]?|\u9009) ?)?"
    r"[\s(\[{$*\"']*(?:\\(?:text|textbf|mathrm|mathbf|boxed)\{)?\(?([A-Za-z])(?:\}|\)|\]|\.|:|\*|\$|\"|'|\s*$)(.*)",
    re.IGNORECASE | re.DOTALL,
)
SECOND_LETTER = re.compile(r"(?:^|[\s(,/&])(?:or|and|,|/|&)?\s*\(?[A-Z]\)?[\s).,]*$")


def read_quantity(text: str) -> Quantity | None:
    """The number that a text spells in any usual way, with its unit; None for any other text."""
    return _read_quantity(text) if len(text) <= MAX_TEXT_CHARACTERS else None


@lru_cache(1024)
def _read_quantity(text: str) -> Quantity | None:
    return parse_quantity(normalised(text))


def plain_quantity(truth: str) -> Quantity | None:
    """The quantity of a truth without LaTeX: where there is some, expressions are to be compared, not numbers."""
    return None if "\\" in LATEX_SIGNS.sub("", truth) else read_quantity(truth)


def same_number(answer: str, truth: str) -> bool:
    """Whether an answer is numerically equal to the truth, as 14, 14.0 and 14 cm are to 14."""
    quantity, true_quantity = read_quantity(answer), plain_quantity(truth)
    return quantity is not None and true_quantity is not None and same_quantity(quantity, true_quantity)


def same_text(answer: str, truth: str) -> bool:
    """Whether two texts are equal, except for markup around them and the amount of white space."""
    return answer.split() == truth.split() or normalised(answer).split() == normalised(truth).split()


def chosen_letter(answer: str) -> str | None:
    """The letter of a choice: B for B, (b), B., "B) Paris", "the answer is B"; None where there is no single letter."""
    match = CHOICE.fullmatch(normalised(answer[:MAX_TEXT_CHARACTERS]))
    if match is None or SECOND_LETTER.search(match.group(2)):
        return None
    return match.group(1).upper()


def same_choice(answer: str, truth: str) -> bool:
    """Whether two answers name the same choice."""
    letter = chosen_letter(answer)
    return letter is not None and letter == chosen_letter(truth)
