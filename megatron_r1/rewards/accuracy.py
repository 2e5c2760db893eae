"""Accuracy reward: 1 for a number equal to the truth inside the answer tags, else 0 (DeepSeek-R1, section 2.2.2)."""

from __future__ import annotations

import re
from fractions import Fraction

from megatron_r1.rewards.extract import tagged_answer

LONGEST_NUMBER = 64
"""Characters; a longer answer is wrong without being read, so no answer can cost more than a glance."""

PLAIN_NUMBER = re.compile(r"[-+]?[0-9]+(?:,[0-9]{3})*(?:\.[0-9]*)?(?:/[0-9]+)?")


def parse_number(text: str) -> Fraction | None:
    """The exact value of an integer, decimal or fraction in ASCII digits; nothing for anything else.

    Spaces around it, a `$...$` pair, one final full stop and commas between thousands are allowed.
    """
    plain = text.strip()
    if len(plain) > LONGEST_NUMBER:
        return None
    plain = plain.strip("$").strip().removesuffix("\u3002").removesuffix(".")
    if not PLAIN_NUMBER.fullmatch(plain):
        return None
    numerator, _, denominator = plain.replace(",", "").partition("/")
    divisor = int(denominator or 1)
    return Fraction(numerator) / divisor if divisor else None


def same_number(a: str, b: str) -> bool:
    """Whether two texts are numerically equal, as 14 and 14.0 are."""
    value = parse_number(a)
    return value is not None and value == parse_number(b)


def accuracy(response: str, truth: str) -> float:
    """1.0 where the response's tagged answer is numerically equal to `truth`, else 0.0."""
    answer = tagged_answer(response)
    return float(answer is not None and same_number(answer, truth))
