"""Facts about a row, which are held instead of its text: hashes, length, reward, verdict, and what dropped it."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from megatron_r1.recipe.candidate import UNKNOWN, Candidate, hash_of
from megatron_r1.recipe.near_duplicates import SIZE, signature
from megatron_r1.recipe.plain_text import signed_words
from megatron_r1.recipe.sources import BadCandidate

KEPT = -1
FACTS = np.dtype(
    [("prompt", "u8"), ("text", "u8"), ("numbers", "u8"), ("length", "u4"), ("reward", "f8"), ("verdict", "i1"),
     ("source", "u2"), ("domain", "u2"), ("reason", "i2")]
)  # fmt: skip
"""What is held of every row, 43 bytes. `prompt`, `text` and `numbers` are hashes: of the question, of question and
response, of the numbers and signs of the question; `length` counts the characters of the response; `reward` is NaN
where the row records none; `reason` is the index of what dropped it, or KEPT."""


def facts_of(row: Candidate | BadCandidate, source: int, reason: int) -> list[Any]:
    """The facts of a row as JSON: those of FACTS, with the name of its domain."""
    if isinstance(row, BadCandidate):
        return [0, 0, 0, 0, None, UNKNOWN, source, row.source, reason]
    length = len(row.response.strip())
    return [
        row.prompt_key, row.text_key, numbers_key(row), length, row.reward, row.verdict, source, row.domain, reason,
    ]  # fmt: skip


def as_array(rows: Sequence[Sequence[Any]], domains: dict[str, int]) -> np.ndarray:
    """[rows] of FACTS; new domains are added to `domains`, name -> index."""
    records = [
        (*row[:4], np.nan if row[4] is None else row[4], *row[5:7], domains.setdefault(row[7], len(domains)), row[8])
        for row in rows
    ]
    return np.array(records, dtype=FACTS)


def numbers_key(row: Candidate) -> int:
    """Hash of the numbers and signs of a question; of a question without numbers that of the prompt."""
    words = [word for word in signed_words(row.question) if not word.isalpha()]
    return hash_of(words) if any(word[0].isdecimal() for word in words) else row.prompt_key


def signature_text(row: Candidate) -> str:
    """The MinHash of a response as text."""
    return base64.b64encode(signature(signed_words(row.response)).astype("<u4").tobytes()).decode()


def signatures_array(texts: Iterable[str]) -> np.ndarray:
    """[rows, SIZE] of signatures."""
    data = b"".join(map(base64.b64decode, texts))
    return np.frombuffer(data, dtype="<u4").reshape(-1, SIZE)
