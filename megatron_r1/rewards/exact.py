"""Answers that are right word for word: text, and the letter of a choice."""

from __future__ import annotations

import re

LONGEST_CHOICE = 2000
CHOICE = re.compile(
    r"(?:(?:the )?(?:correct )?(?:answer|option|choice)(?: is)?[:\s]+)?"
    r"[\s(\[{$*\"']*(?:\\(?:text|mathrm|mathbf|boxed)\{)?\(?([A-Za-z])(?:\}|\)|\]|\.|:|\*|\$|\"|'|\s*$)(.*)",
    re.IGNORECASE | re.DOTALL,
)
SECOND = re.compile(r"(?:^|[\s(,/&])(?:or|and|,|/|&)?\s*\(?[A-Z]\)?[\s).,]*$")


def same_text(answer: str, truth: str) -> bool:
    """Whether two texts are equal but for the amount of white space."""
    return answer.split() == truth.split()


def chosen_letter(answer: str) -> str | None:
    """The letter of a choice: B for B, (b), B., "B) Paris", "the answer is B"; nothing where it is not one letter."""
    match = CHOICE.fullmatch(answer.strip()[:LONGEST_CHOICE])
    if match is None or SECOND.search(match.group(2)):
        return None
    return match.group(1).upper()


def same_choice(answer: str, truth: str) -> bool:
    """Whether two answers name the same choice."""
    letter = chosen_letter(answer)
    return letter is not None and letter == chosen_letter(truth)
