"""The words of a text in Chinese and English, distinguished by their script.

A sequence of letters is one word, and so is each Han character, because words in Chinese cannot be separated without a
dictionary. ASCII letters are English; other letters (accented, Cyrillic, kana, Hangul) make words of other languages;
digits, signs and LaTeX commands are no words. The script is enough because R1's prompts are in Chinese and English
only; a library that detects languages needs whole sentences and fails on formulas.
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
