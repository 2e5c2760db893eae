"""Fill in the middle: some documents are reordered, so that the model learns to write text between two others.

Prefix-suffix-middle order at document level, before packing (DeepSeek-V3 report, section 4.1):
`<fim_begin> prefix <fim_hole> suffix <fim_end> middle <eos>`. The two cuts fall between any two characters (Bavarian
et al. 2022). The three parts are tokenised separately.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_r1.data.counter_rng import uniforms
from megatron_r1.data.prepare.words import as_bytes
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import ConfigError

FIM_BEGIN, FIM_HOLE, FIM_END = FIM_TOKENS = ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>")
CHOICE, FIRST_CUT, SECOND_CUT = range(3)


class FillInMiddle:
    """Decides which documents are reordered, and where they are cut."""

    def __init__(self, tokenizer: Tokenizer, rate: float, seed: int):
        """
        Args:
            rate: share of documents to reorder.

        Raises:
            ConfigError: `rate` is above 0 and the tokenizer lacks one of the three tokens.
        """
        missing = [token for token in FIM_TOKENS if tokenizer.backend.token_to_id(token) is None]
        if rate and missing:
            raise ConfigError("fim_rate", rate, f"must be 0 for a tokenizer without {missing[0]}")
        self._rate, self._seed = rate, seed
        marks = (0, 0, 0) if missing else map(tokenizer.id, FIM_TOKENS)
        self.begin, self.hole, self.end = (as_bytes([mark]) for mark in marks)

    def parts(self, texts: Sequence[str], keys_N2: np.ndarray) -> list[tuple[str, ...]]:
        """Each text, either whole as one part, or cut into prefix, middle and suffix.

        Args:
            texts: N documents.
            keys_N2: file and row of each; the choice and the cuts depend on them and the seed alone.
        """
        if not self._rate:
            return [(text,) for text in texts]
        draws_N3 = uniforms(self._seed, keys_N2[:, :1], keys_N2[:, 1:], np.arange(3))
        return [
            cut(text, draws_3[FIRST_CUT], draws_3[SECOND_CUT]) if draws_3[CHOICE] < self._rate else (text,)
            for text, draws_3 in zip(texts, draws_N3.tolist(), strict=True)
        ]

    def arrange(self, prefix: bytes, middle: bytes, suffix: bytes) -> tuple[bytes, ...]:
        """The bytes of the three parts' ids with their marker tokens, in stored order; without the end token."""
        return self.begin, prefix, self.hole, suffix, self.end, middle


def cut(text: str, first: float, second: float) -> tuple[str, str, str]:
    """Prefix, middle and suffix; the cuts are shares of the text, in any order, and any part may be empty."""
    start, stop = sorted(int(share * (len(text) + 1)) for share in (first, second))
    return text[:start], text[start:stop], text[stop:]
