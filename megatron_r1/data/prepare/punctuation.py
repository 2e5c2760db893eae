"""Tokens that join punctuation to line breaks, some of which are split in two.

A vocabulary with tokens such as `.\\n\\n` biases a model where a prompt ends in `.` without a line break: in training
the model has met the token `.` only where no line break follows. A random share of such tokens is therefore split into
punctuation and line breaks (DeepSeek-V3 report, section 4.1).
"""

from __future__ import annotations

import unicodedata

import numpy as np

from megatron_r1.data.counter_rng import uniforms
from megatron_r1.data.tokenizer import Tokenizer

STREAM = 3
"""Counter that makes these draws independent of those for fill-in-the-middle."""


class PunctuationSplitter:
    """Splits a random share of the vocabulary's merged tokens into their parts."""

    def __init__(self, tokenizer: Tokenizer, rate: float, seed: int):
        """
        Args:
            rate: share of occurrences to split.
        """
        self._rate, self._seed = rate, seed
        parts = merged_tokens(tokenizer) if rate else {}
        self._merged_V = np.zeros(tokenizer.vocab_size, dtype=bool)
        self._merged_V[list(parts)] = True
        self._parts = {token: np.array(ids, dtype=np.int32) for token, ids in parts.items()}
        self._count_V = np.ones(tokenizer.vocab_size, dtype=np.int64)
        for token, ids in parts.items():
            self._count_V[token] = len(ids)

    def split(self, tokens_T: np.ndarray, lengths_N: np.ndarray, keys_N2: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Documents with some of their merged tokens split.

        Args:
            tokens_T: token ids of N documents, end to end.
            lengths_N: tokens of each.
            keys_N2: file and row of each; a draw depends on them and on the position in the document.

        Returns:
            New `tokens_T` and `lengths_N`.
        """
        if not self._parts:
            return tokens_T, lengths_N
        positions = np.flatnonzero(self._merged_V[tokens_T])
        ends_N = np.cumsum(lengths_N)
        documents = np.searchsorted(ends_N, positions, side="right")
        within = positions - (ends_N - lengths_N)[documents]
        draws = uniforms(self._seed, keys_N2[documents, 0], keys_N2[documents, 1], STREAM, within)
        chosen = draws < self._rate
        positions, documents = positions[chosen], documents[chosen]
        if not len(positions):
            return tokens_T, lengths_N
        split = tokens_T[positions]
        added = self._count_V[split] - 1
        counts_T = np.ones(len(tokens_T), dtype=np.int64)
        counts_T[positions] += added
        result_T = np.repeat(tokens_T, counts_T)
        parts = np.concatenate([self._parts[token] for token in split.tolist()])
        result_T[np.repeat(_is_chosen(len(tokens_T), positions), counts_T)] = parts
        new_lengths_N = lengths_N.copy()
        np.add.at(new_lengths_N, documents, added)
        return result_T, new_lengths_N


def _is_chosen(length: int, positions: np.ndarray) -> np.ndarray:
    chosen_T = np.zeros(length, dtype=bool)
    chosen_T[positions] = True
    return chosen_T


def merged_tokens(tokenizer: Tokenizer) -> dict[int, list[int]]:
    """Token id -> ids of its punctuation and its line breaks, for every token that is punctuation, then line breaks."""
    ids = list(tokenizer.backend.get_vocab().values())
    texts = tokenizer.backend.decode_batch([[token] for token in ids], skip_special_tokens=False)
    result = {}
    for token, text in zip(ids, texts, strict=True):
        punctuation = text.rstrip("\r\n")
        if punctuation != text and punctuation and _is_punctuation(punctuation):
            parts = [*tokenizer.encode(punctuation), *tokenizer.encode(text[len(punctuation) :])]
            if tokenizer.decode(parts) == text:
                result[token] = parts
    return result


def _is_punctuation(text: str) -> bool:
    """Whether a text is punctuation or symbols, a leading space aside."""
    stripped = text.removeprefix(" ")
    return bool(stripped) and all(unicodedata.category(character)[0] in "PS" for character in stripped)
