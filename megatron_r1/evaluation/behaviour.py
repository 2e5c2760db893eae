"""How a model writes, whatever is correct: mixing of languages, reflection words, length."""

from __future__ import annotations

import re

from megatron_r1.rewards.words import languages

REFLECTION_WORDS = ("wait", "mistake", "however", "but", "retry", "error", "verify", "wrong", "evaluate", "check")
"""Words whose growing number shows reflection (DeepSeek-R1, arXiv 2501.12948v2, section C.2)."""
_REFLECTION = re.compile(rf"\b(?:{'|'.join(REFLECTION_WORDS)})\b")
MIXED_ABOVE = 0.02
"""Share of words outside a response's main language above which it mixes languages: more than a quoted name."""


def mixes_languages(text: str) -> bool:
    """Whether the prose of a response, its reasoning and its summary, is in more than one language.

    Languages are distinguished by script, as the language reward does; formulas and code belong to none.
    """
    if text.isascii():
        return False  # no word outside of English, and most responses: no need to count
    counts = languages(text)
    total = counts.total()
    return bool(total) and 1 - max(counts.values()) / total > MIXED_ABOVE


def reflection_words(text: str) -> int:
    """Number of reflection words in a response."""
    return len(_REFLECTION.findall(text.lower()))
