"""Encodes texts: drops contaminated ones, reorders some for fill-in-the-middle, adds BOS and EOS, splits punctuation.

Shapes: N documents, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain

import numpy as np

from megatron_r1.data.prepare.decontaminate import NgramIndex
from megatron_r1.data.prepare.fim import FIM_TOKENS, FillInMiddle
from megatron_r1.data.prepare.options import TokeniseOptions
from megatron_r1.data.prepare.punctuation import PunctuationSplitter
from megatron_r1.data.prepare.sources import RawRecord
from megatron_r1.data.prepare.words import WordEncoder, as_bytes
from megatron_r1.data.tokenizer import Tokenizer

Pieces = tuple[bytes, ...]
"""Of a document: the bytes of int32 token ids."""


@dataclass(frozen=True)
class Encoded:
    """Tokenised documents, and the rows that were dropped."""

    tokens_T: np.ndarray
    """Token ids, end to end: int32."""
    lengths_N: np.ndarray
    """Tokens of each document: int64."""
    reordered: int = 0
    """Number of documents that were reordered for fill-in-the-middle."""
    bad: list[tuple[RawRecord, str]] = field(default_factory=list)
    """Rows that cannot be used, with the reason."""
    contaminated: list[tuple[RawRecord, str]] = field(default_factory=list)
    """Rows that share an n-gram with an evaluation set, with the reason."""


class DocumentEncoder:
    """Encodes batches of rows; the tokens of a row do not depend on the other rows of its batch."""

    def __init__(self, tokenizer: Tokenizer, options: TokeniseOptions, contamination: NgramIndex):
        """
        Args:
            tokenizer: is changed: it now encodes special tokens that a text spells as ordinary characters.
        """
        self._tokenizer, self._contamination = tokenizer, contamination
        tokenizer.backend.encode_special_tokens = True
        named = [tokenizer.decode([token]) for token in (*tokenizer.begin, tokenizer.eos, tokenizer.pad)]
        # A control token that the vocabulary does not mark as special would still become one token: such rows are bad.
        self._control = [
            token
            for token in dict.fromkeys([*named, *FIM_TOKENS])
            if tokenizer.encode(token) == [tokenizer.backend.token_to_id(token)]
        ]
        self._middle = FillInMiddle(tokenizer, options.fim_rate, options.seed)
        self._words = WordEncoder(tokenizer.backend)
        self._begin, self._end = as_bytes(tokenizer.begin), as_bytes([tokenizer.eos])
        self._splitter = PunctuationSplitter(tokenizer, options.punctuation_split_rate, options.seed)

    def encode(self, rows: Sequence[RawRecord]) -> Encoded:
        """The documents of the good rows, in order."""
        bad = [(row, problem) for row in rows if (problem := row.problem or self._problem(row.text))]
        refused = {id(row) for row, _ in bad}
        good = [row for row in rows if id(row) not in refused]
        matches = self._contamination.matches([row.text for row in good])
        contaminated = [(good[index], reason) for index, reason in matches.items()]
        good = [row for index, row in enumerate(good) if index not in matches]
        if not good:
            return Encoded(np.empty(0, np.int32), np.empty(0, np.int64), 0, bad, contaminated)
        keys_N2 = np.array([(row.source, row.number) for row in good], dtype=np.int64)
        parts = self._middle.parts([row.text for row in good], keys_N2)
        documents = self._documents(parts)
        sizes_N = np.fromiter((sum(map(len, pieces)) for pieces in documents), np.int64, len(documents))
        tokens_T = np.frombuffer(b"".join(chain.from_iterable(documents)), np.int32)
        lengths_N = sizes_N // tokens_T.itemsize
        tokens_T, lengths_N = self._splitter.split(tokens_T, lengths_N, keys_N2)
        return Encoded(tokens_T, lengths_N, sum(len(part) > 1 for part in parts), bad, contaminated)

    def _documents(self, parts: Sequence[tuple[str, ...]]) -> list[Pieces]:
        """For each document the pieces whose concatenation it is."""
        found = iter(self._words.encode([text for part in parts for text in part]))
        begin, end = self._begin, self._end
        return [
            (begin, next(found), end)
            if len(part) == 1
            else (begin, *self._middle.arrange(next(found), next(found), next(found)), end)
            for part in parts
        ]

    def _problem(self, text: str) -> str:
        found = [token for token in self._control if token in text]
        return f"holds the control token {found[0]}" if found else ""
