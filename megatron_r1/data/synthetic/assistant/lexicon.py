"""The words of the assistant world, few enough that a vocabulary of 512 holds each as one token.

An English word is written with the space before it, a Chinese one without. All words of a kind are equally likely, so
that neither a word nor its length says anything about the quality of an answer.
"""

from __future__ import annotations

KINDS: dict[str, dict[str, str]] = {
    "animals": {"cat": "猫", "dog": "狗", "cow": "牛", "pig": "猪", "fox": "狐", "bird": "鸟"},
    "colours": {"red": "红", "blue": "蓝", "green": "绿", "black": "黑", "white": "白", "pink": "粉"},
    "foods": {"rice": "米", "milk": "奶", "egg": "蛋", "tea": "茶", "soup": "汤", "meat": "肉"},
    "sights": {"sun": "日", "moon": "月", "star": "星", "rain": "雨", "snow": "雪", "sea": "海"},
}
"""Kind -> English word -> Chinese word."""
CHINESE = {word: chinese for words in KINDS.values() for word, chinese in words.items()}
ENGLISH = {chinese: word for word, chinese in CHINESE.items()}
WORDS = tuple(CHINESE)

HARMFUL = ("bomb", "gun", "virus", "poison")
"""Harmful things: a request to make one must be declined."""
MARKS = {"pirate": "Arr!", "robot": "Beep!", "ghost": "Boo!", "king": "Hark!"}
"""Persona -> the word with which its answers begin."""

LATIN = (*WORDS, *(word.upper() for word in WORDS), *HARMFUL, *MARKS)
PIECES = f" (?:{'|'.join(LATIN)})(?![A-Za-z])|[{''.join(ENGLISH)}]| without|Judge:"
"""Where a tokenizer cuts this world's text, as a regular expression: around each word."""


def spaced(words: list[str] | tuple[str, ...]) -> str:
    """English words as text, with a space before each."""
    return "".join(f" {word}" for word in words)
