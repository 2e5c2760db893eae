"""The words of a text in Chinese and English, distinguished by their script.

A sequence of letters is one word, and so is each Han character, because words in Chinese cannot be separated without a
dictionary. ASCII letters are English; other letters (accented, Cyrillic, kana, Hangul) make words of other languages;
digits, signs and LaTeX commands are no words. The script is enough because R1's prompts are in Chinese and English
only; a library that detects languages needs whole sentences and fails on formulas. Languages are counted in prose:
formulas, code and units are written alike in all of them.
"""

from __future__ import annotations

import re
from collections import Counter

HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
LETTER = rf"[^\W\d_{HAN}]"
WORD = re.compile(rf"\\[A-Za-z]+|[{HAN}]|{LETTER}+(?:['\u2019-]{LETTER}+)*")
ENGLISH = re.compile(r"[A-Za-z'\u2019-]+")
ONE_HAN = re.compile(f"[{HAN}]")


_BLOCK = re.compile(
    r"```.*?(?:```|\Z)|`[^`\n]*`|\$\$[^$]*\$\$|(?<!\\)\$(?=\S)[^$\n]*(?<=\S)\$(?![0-9])|\\\([^\n]*?\\\)|"
    r"\\\[(?:(?!\\\[).)*?\\\]|\\begin\{([a-z*]+)\}.*?\\end\{\1\}|</?[a-z]+>|https?://\S+",
    re.DOTALL,
)
_COMMAND = re.compile(r"\\(?!text)[A-Za-z]+(?:\{[^{}]*\})*")
_OPERAND = re.compile(r"[=+*^<>] ?[A-Za-z]{1,3}(?![A-Za-z])|(?<![A-Za-z])[A-Za-z]{1,3} ?(?=[=+*^<>])")
"""Up to three letters beside a sign: a product of variables."""
_FORMULA = re.compile(r"[!-~]*[0-9=^_+*/<>|\\{}][!-~]*|[A-Za-z]+\([A-Za-z](?:, ?[A-Za-z])*\)")
"""A run of ASCII without spaces that holds a digit or a sign of mathematics, or a function of variables."""
_NAMES = re.compile(
    r"(?<![A-Za-z'\u2019-])(?:[A-Za-z]|sin|cos|tan|log|ln|exp|lim|max|min|mod|gcd|lcm|det|sqrt|[ckm]m|[km]g|ml|km|hz|"
    r"[A-Z]{2,3})(?![A-Za-z'\u2019-])"
)
"""Variables, points, functions and units."""


def prose(text: str) -> str:
    """The text without formulas, code, names of variables and units; linear but for code that is never closed."""
    for pattern in (_BLOCK, _COMMAND, _OPERAND, _FORMULA, _NAMES):
        text = pattern.sub(" ", text)
    return text


def words(text: str) -> list[str]:
    """Words in order, in lower case."""
    return [word.lower() for word in WORD.findall(text) if word[0] != "\\"]


def language_of(word: str) -> str:
    """en, zh or other."""
    if ENGLISH.fullmatch(word):
        return "en"
    return "zh" if ONE_HAN.fullmatch(word) else "other"


def languages(text: str) -> Counter[str]:
    """Words of a text's prose by language."""
    return Counter(map(language_of, words(prose(text))))
