"""Numbers in other formats: words in English and Chinese, separators, full-width digits."""

from __future__ import annotations

import random
import re
from collections.abc import Callable

SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
DIGITS = "零一二三四五六七八九"


def english(number: int) -> str:
    """A number below a billion in words."""
    for scale, name in ((10**6, "million"), (10**3, "thousand"), (100, "hundred")):
        if number >= scale:
            rest = f" {english(number % scale)}" if number % scale else ""
            return f"{english(number // scale)} {name}{rest}"
    if number < 20:
        return SMALL[number]
    return TENS[number // 10 - 2] + (f"-{SMALL[number % 10]}" if number % 10 else "")


def chinese(number: int) -> str:
    """A number below 100 million in Chinese words."""
    if number >= 10**4:
        rest = number % 10**4
        filler = "零" if 0 < rest < 1000 else ""
        return f"{chinese(number // 10**4)}万{filler}{chinese(rest) if rest else ''}"
    text, gap = "", False
    for unit, name in ((1000, "千"), (100, "百"), (10, "十"), (1, "")):
        digit = number // unit % 10
        if digit:
            text += ("零" if gap and text else "") + DIGITS[digit] + name
        gap = digit == 0
    return text or "零"


def full_width(number: int) -> str:
    return str(number).translate({ord("0") + digit: 0xFF10 + digit for digit in range(10)})


def reformatted(text: str, rng: random.Random, language: str) -> str:
    """The text with every whole number in another format, the same throughout."""
    formats: list[Callable[[int], str]] = [
        lambda number: f"{number:,}",
        lambda number: f"{number:,}".replace(",", "\u202f"),
        lambda number: f"{number:,}".replace(",", "{,}"),
        lambda number: f"{number}.0",
        lambda number: f"{number}.00",
        full_width,
        english if language == "en" else chinese,
    ]
    chosen = rng.choice(formats[3:])
    if re.search(r"\d{4}", text):
        chosen = rng.choice(formats)
    return re.sub(r"(?<![\d.,])\d+(?![\d.,]*\d)", lambda found: chosen(int(found[0])), text.replace(",000", "000"))
