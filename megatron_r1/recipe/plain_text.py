"""Texts in the form in which curation compares them: words, numbers and signs, without case, spacing and markdown."""

from __future__ import annotations

import re
from functools import lru_cache

from megatron_r1.data.prepare.number_forms import plain_numbers
from megatron_r1.rewards.normalise import INVISIBLE
from megatron_r1.rewards.words import HAN

_BULLET = re.compile(r"^[^\S\n]*(?:[-*+>]|#{1,6}|\d+[.)])[^\S\n]+", re.MULTILINE)
_MARKDOWN = re.compile(r"(\*{1,3}|_{2,3}|`{1,3})(?=\S)([^\n]+?)(?<=\S)\1")
_SIGNS = str.maketrans({"\u2212": "-", "\u00d7": "*", "\u00f7": "/", "\u22c5": "*", "\u00b7": "*"})
_LATEX_SIGNS = re.compile(r"\\(?:times|cdot)(?![A-Za-z])")
_TOKEN = re.compile(rf"[{HAN}]|\d+(?:\.\d+)?|[^\W\d_{HAN}]+|[-+*/=<>^%]")


def signed_words(text: str) -> list[str]:
    """Words, numbers in digits and arithmetic signs of a text, in order; a Han character is a word."""
    return signed_text(text).split()


@lru_cache(4096)
def signed_text(text: str) -> str:
    """The same with spaces between them; the latest are remembered, as several filters read each text of a part."""
    text = _MARKDOWN.sub(r"\2", _BULLET.sub(" ", text.translate(INVISIBLE)))
    return " ".join(_TOKEN.findall(plain_numbers(_LATEX_SIGNS.sub("*", text).translate(_SIGNS))))


def count_words(text: str) -> int:
    """Words, numbers and signs of a text as it is written."""
    return len(_TOKEN.findall(text))
