"""The words of a text in Chinese and English, told apart by their script.

A run of letters is one word, and so is each Han character, which is what a Chinese word comes to without a dictionary.
Letters of English are ASCII; other letters (accented, Cyrillic, kana, Hangul) are words of other languages, digits,
signs and LaTeX commands are none. R1's prompts are Chinese and English alone, so that the script decides: a library
that guesses languages needs whole sentences and is wrong on formulas.
"""

from __future__ import annotations

import re
from collections import Counter

HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
LETTER = rf"[^\W\d_{HAN}]"
WORD = re.compile(rf"\\[A-Za-z]+|[{HAN}]|{LETTER}+(?:['\u2019-]{LETTER}+)*")
ENGLISH = re.compile(r"[A-Za-z'\u2019-]+")
ONE_HAN = re.compile(f"[{HAN}]")


def words(text: str) -> list[str]:
    """Words in order, in lower case."""
    return [word.lower() for word in WORD.findall(text) if word[0] != "\\"]


def language_of(word: str) -> str:
    """en, zh or other."""
    if ENGLISH.fullmatch(word):
        return "en"
    return "zh" if ONE_HAN.fullmatch(word) else "other"


def languages(text: str) -> Counter[str]:
    """Words of a text by language."""
    return Counter(map(language_of, words(text)))
