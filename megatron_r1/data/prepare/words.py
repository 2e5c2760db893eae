r"""Token ids of texts, put together from those of their words: most words of a corpus are repetitions.

A tokenizer spends over a microsecond on a token (added tokens, regular expressions, merges); looking a word's ids up
takes a tenth of that. Texts are cut before every space that follows another character than white space. That changes
no id where the tokenizer itself always cuts there: no alternative of its pattern matches white space behind anything
else, none looks back, and what looks ahead (`\s+(?!\S)`) takes a space and the end of a text alike. This is known of
the patterns listed here; with any other tokenizer, texts are encoded whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer as Backend

REMEMBERED_CHARACTERS = 1 << 21
"""Of all words remembered; with more, all are forgotten. Some 100 MB."""
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
)
PATTERNS = ((), (GPT2,), (LLAMA3,), (QWEN2,), DEEPSEEK_V3)
"""Of splits in a row, before the text becomes bytes; without a split, GPT-2's is part of that step."""
_cut = re.compile(r"(?<=\S)(?= )").split


class WordEncoder:
    """Encodes texts, without begin and end tokens."""

    def __init__(self, backend: Backend):
        self._backend, self._by_word = backend, cuts_at_spaces(backend)
        self._ids_of: dict[str, bytes] = {}
        self._characters = 0

    def encode(self, texts: Sequence[str]) -> list[bytes]:
        """Each text's token ids, as the bytes of int32 numbers."""
        if not self._by_word:
            return self._encoded(texts)
        texts_words = [_cut(text) for text in texts]
        if self._characters > REMEMBERED_CHARACTERS:
            self._ids_of, self._characters = {}, 0
        new = list(set().union(*texts_words) - self._ids_of.keys())
        self._ids_of.update(zip(new, self._encoded(new), strict=True))
        self._characters += sum(map(len, new))
        ids_of = self._ids_of.__getitem__
        return [b"".join(map(ids_of, words)) for words in texts_words]

    def _encoded(self, texts: Sequence[str]) -> list[bytes]:
        return [as_bytes(found.ids) for found in self._backend.encode_batch_fast(texts, add_special_tokens=False)]


def as_bytes(ids: Iterable[int]) -> bytes:
    """Token ids as the bytes of int32 numbers."""
    return np.array(ids, dtype=np.int32).tobytes()


def cuts_at_spaces(backend: Backend) -> bool:
    """Whether this tokenizer always cuts a text before a space that follows another character than white space."""
    added = backend.get_added_tokens_decoder().values()
    plain = not any(
        token.lstrip or token.rstrip or token.single_word or len(_cut(token.content)) > 1 for token in added
    )
    whole = backend.truncation is None and backend.padding is None
    random = getattr(backend.model, "dropout", None)
    return plain and whole and not random and _keeps_spaces(backend) and _splits(backend) in PATTERNS


def _keeps_spaces(backend: Backend) -> bool:
    steps = _steps(backend.normalizer, "normalizers")
    return all(step["type"] == "NFC" for step in steps)


def _splits(backend: Backend) -> tuple[str, ...] | None:
    """The patterns of a tokenizer that cuts a text by regular expressions and takes bytes then; None of others."""
    *splits, last = _steps(backend.pre_tokenizer, "pretokenizers") or [{}]
    plain = {"type": "Split", "behavior": "Isolated", "invert": False}
    if any({key: split.get(key) for key in plain} != plain for split in splits):
        return None
    if last.get("type") != "ByteLevel" or last["add_prefix_space"] or last["use_regex"] == bool(splits):
        return None
    return tuple(split["pattern"].get("Regex", "") for split in splits)


def _steps(component: Any, inside: str) -> list[dict[str, Any]]:
    """The steps of a normaliser or pre-tokenizer, as `tokenizer.json` describes them."""
    if component is None:
        return []
    described: dict[str, Any] = json.loads(component.__getstate__())
    return described[inside] if described["type"] == "Sequence" else [described]
