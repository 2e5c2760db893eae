"""Finds responses with nearly the same words by MinHash (Broder 1997).

A signature estimates which share of their three-word sequences two texts have in common. Only rows of one group are
compared, the samples of a prompt for one, of which there are few: each with each, without an index. The libraries for
this (`datasketch`, `text-dedup`) index whole data sets, in Python sets for every band of every row, without groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from zlib import crc32

import numpy as np

SIZE = 64
"""Numbers of a signature; the share of equal ones is the share of common sequences within about 0.06."""
SHINGLE = 3
"""Words of a sequence."""
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_random = np.random.default_rng(20240501)
_MIXERS = [
    (factor | np.uint64(1), offset) for factor, offset in _random.integers(2**63, size=(SIZE, 2), dtype=np.uint64)
]


def signature(words: Sequence[str]) -> np.ndarray:
    """The MinHash of a text's sequences of words.

    Returns:
        [SIZE] numbers of 32 bits; zeros for a text without words.
    """
    if not words:
        return np.zeros(SIZE, dtype=np.uint32)
    ids = np.array([crc32(word.encode(errors="replace")) for word in words], dtype=np.uint64)
    count = max(1, len(ids) - SHINGLE + 1)
    hashes = np.zeros(count, dtype=np.uint64)
    for offset in range(min(SHINGLE, len(ids))):
        hashes = (hashes + ids[offset : offset + count]) * _MULTIPLIER
        hashes ^= hashes >> np.uint64(29)
    # One number after the other: all at once they would leave the processor's cache.
    smallest = [(hashes * factor + offset).min() >> np.uint64(32) for factor, offset in _MIXERS]
    return np.array(smallest, dtype=np.uint32)


def near_duplicates(signatures: np.ndarray, groups: np.ndarray, share: float) -> np.ndarray:
    """Rows whose words are nearly those of an earlier row of their group that is kept itself.

    Args:
        signatures: [rows, SIZE].
        groups: [rows] key of each row's group.
        share: least share of equal numbers.

    Returns:
        [dropped] indices of rows, ascending.
    """
    order = np.argsort(groups, kind="stable")
    starts = np.flatnonzero(np.diff(groups[order])) + 1
    dropped: list[int] = []
    for group in np.split(order, starts):
        kept: list[int] = []
        for row in group.tolist():
            if kept and ((signatures[kept] == signatures[row]).mean(axis=1) >= share).any():
                dropped.append(row)
            else:
                kept.append(row)
    return np.array(sorted(dropped), dtype=np.int64)
