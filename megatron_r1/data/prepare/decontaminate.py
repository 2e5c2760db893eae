"""Finds documents that share an n-gram of words with an evaluation text (DeepSeek-R1 report: 10-grams).

A word is a run of letters and digits, or a single Chinese or Japanese character; case and punctuation do not count.
Words that occur in no evaluation text get the number 0 and are never part of a match; the others are hashed n at a
time, and every match of hashes is compared word by word.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from itertools import repeat
from typing import NamedTuple

import numpy as np

_CHARACTERS = "\u3400-\u9fff\u3040-\u30ff"
WORD = re.compile(rf"[{_CHARACTERS}]|[^\W_{_CHARACTERS}]+")
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


class Evaluation(NamedTuple):
    """An evaluation text, which training data must not contain."""

    name: str
    """File and row, for messages."""
    text: str


class NgramIndex:
    """All n-grams of words of some evaluation texts."""

    def __init__(self, evaluations: Iterable[Evaluation], n: int, spelt: Callable[[str], str] = str.casefold):
        """
        Args:
            n: words in a row that make a match.
            spelt: text -> the text with one spelling for what counts as the same, such as numbers in any format.
        """
        self._n, self._spelt = n, spelt
        self._numbers: dict[str, int] = {}
        self._names: list[str] = []
        parts, owners = [], []
        self.too_short: list[str] = []
        """Names of the texts with fewer than n words, which no document can match."""
        for evaluation in evaluations:
            words = self._words(evaluation.text)
            if len(words) < n:
                self.too_short.append(evaluation.name)
                continue
            # A 0 after each text keeps n-grams inside it.
            parts.append([*(self._numbers.setdefault(word, len(self._numbers) + 1) for word in words), 0])
            owners.append(np.full(len(words) + 1, len(self._names)))
            self._names.append(evaluation.name)
        self._flat = np.array([number for part in parts for number in part], dtype=np.uint64)
        self._owners = np.concatenate([np.empty(0, dtype=np.int64), *owners])
        starts, hashes = self._hashes(self._flat)
        order = np.argsort(hashes, kind="stable")
        self._starts, self._known = starts[order], hashes[order]

    def __len__(self) -> int:
        return len(self._known)

    def matches(self, texts: Sequence[str]) -> dict[int, str]:
        """Index of each contaminated text -> the reason, which names the evaluation text."""
        if not len(self):
            return {}
        get = self._numbers.get
        numbers: list[int] = []
        ends = []
        for text in texts:
            numbers.extend(map(get, self._words(text), repeat(0)))
            numbers.append(0)
            ends.append(len(numbers))
        flat = np.array(numbers, dtype=np.uint64)
        starts, hashes = self._hashes(flat)
        found = np.searchsorted(self._known, hashes)
        found[found == len(self._known)] = 0
        result: dict[int, str] = {}
        for match in np.flatnonzero(self._known[found] == hashes).tolist():
            theirs = int(self._starts[found[match]])
            mine = int(starts[match])
            index = int(np.searchsorted(ends, mine, side="right"))
            if index not in result and (flat[mine : mine + self._n] == self._flat[theirs : theirs + self._n]).all():
                result[index] = f"shares {self._n} words in a row with {self._names[int(self._owners[theirs])]}"
        return result

    def _hashes(self, flat: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Start and hash of every n-gram without a 0."""
        count = len(flat) - self._n + 1
        if count < 1:
            return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.uint64)
        zeros = np.concatenate([[0], np.cumsum(flat == 0)])
        starts = np.flatnonzero(zeros[self._n :] == zeros[:count])
        hashes = np.zeros(len(starts), dtype=np.uint64)
        for offset in range(self._n):
            hashes = hashes * MULTIPLIER + flat[starts + offset]
        return starts, hashes

    def _words(self, text: str) -> list[str]:
        return WORD.findall(self._spelt(text))
