"""repetition: the reasoning does not repeat itself (DeepSeek-R1, Nature version, supplement B.3: cold-start data are
filtered by detecting repetition)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_r1.recipe.candidate import Candidate
from megatron_r1.recipe.plain_text import signed_words
from megatron_r1.rewards.repetition import repetition

LONGEST_PHRASE = 60
"""Words of the longest phrase whose loop is found."""


def repeats_itself(candidate: Candidate, ngram_size: int, share: float, times: int, words: int) -> str:
    """Why a response counts as repeating itself.

    Args:
        ngram_size: words of the n-grams that are counted.
        share: largest share of n-grams that occurred before.
        times: repetitions in a row that make a loop.
        words: least words of a loop, all its repetitions together.
    """
    repeated = -repetition(candidate.response, ngram_size)
    if repeated > share:
        return f"{repeated:.0%} of its {ngram_size}-grams occurred before"
    phrase, length = longest_loop(signed_words(candidate.response), times)
    return f"repeats {' '.join(phrase[:8])!r} over {length} words" if length >= words else ""


def longest_loop(words: Sequence[str], times: int) -> tuple[Sequence[str], int]:
    """The phrase that is repeated in a row over most words, at least `times` times, and over how many words."""
    numbers: dict[str, int] = {}
    ids = np.array([numbers.setdefault(word, len(numbers)) for word in words], dtype=np.int64)
    best: tuple[Sequence[str], int] = ((), 0)
    for period in range(1, min(LONGEST_PHRASE, len(words) // times) + 1):
        start, length = _longest_run(ids[period:] == ids[:-period])
        if length >= (times - 1) * period and length + period > best[1]:
            best = (words[start : start + period], length + period)
    return best


def _longest_run(equal: np.ndarray) -> tuple[int, int]:
    """Start and length of the longest run of true values."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], equal, [False]]).astype(np.int8)))
    if not len(edges):
        return 0, 0
    starts, lengths = edges[::2], edges[1::2] - edges[::2]
    longest = int(np.argmax(lengths))
    return int(starts[longest]), int(lengths[longest])
