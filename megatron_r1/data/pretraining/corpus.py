"""Pre-training text as one array of tokens, read by position.

Documents are concatenated, `[BOS] document [EOS]`, and cut into sequences. A position is the number of sequences
consumed since the start of training; it alone decides which sequence comes next, so a resume needs one number. Every
epoch visits each sequence once, in an order of its own.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from itertools import batched
from pathlib import Path

import numpy as np

from megatron_r1.config.data import DataConfig
from megatron_r1.data.synthetic.worlds import world_of
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import DataError
from megatron_r1.files import replacing

FORMAT_VERSION = 1
DOCUMENTS_AT_ONCE = 10_000


class Corpus:
    """Sequences of `sequence_length` inputs and one more token, the last target.

    Args:
        tokens: flat token ids, may be memory-mapped.
        sequence_length: inputs per sequence; the last token of a sequence is also the first of the next, so that every
            token is a target once.
        seed: of the order in which epochs visit the sequences.
    """

    def __init__(self, tokens: np.ndarray, sequence_length: int, seed: int):
        self.tokens, self.sequence_length, self.seed = tokens, sequence_length, seed
        self.num_sequences = (len(tokens) - 1) // sequence_length
        if self.num_sequences < 1:
            raise DataError(f"sequence_length={sequence_length}: the corpus has only {len(tokens)} tokens")
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    def batch(self, position: int, size: int) -> np.ndarray:
        """Sequences `position` to `position + size - 1` of the endless series of epochs.

        Returns:
            int64 of shape [size, sequence_length + 1].
        """
        rows = np.empty((size, self.sequence_length + 1), dtype=np.int64)
        for row, at in enumerate(range(position, position + size)):
            epoch, index = divmod(at, self.num_sequences)
            start = int(self.order(epoch)[index]) * self.sequence_length
            rows[row] = self.tokens[start : start + self.sequence_length + 1]
        return rows

    def order(self, epoch: int) -> np.ndarray:
        """The order in which `epoch` visits the sequences: int64 [num_sequences]."""
        if self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng([self.seed, epoch]).permutation(self.num_sequences))
        return self._order[1]


def build_corpus(config: DataConfig, tokenizer: Tokenizer, sequence_length: int, seed: int, folder: Path) -> Corpus:
    """The corpus of a config, tokenised once and stored in `folder` as a memory-mapped `.npy`.

    The file's name is a fingerprint of the config and the tokenizer, and the file appears complete or not at all, so
    several processes may build it at once.
    """
    path = Path(folder) / f"corpus-{fingerprint(config, tokenizer)}.npy"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part, part.open("wb") as file:
            np.save(file, tokenise(config, tokenizer))
    return Corpus(np.load(path, mmap_mode="r", allow_pickle=False), sequence_length, seed)


def tokenise(config: DataConfig, tokenizer: Tokenizer) -> np.ndarray:
    """All documents of a config as flat token ids: uint16 where the vocabulary fits, else int32."""
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.int32
    parts = []
    for texts in batched(world_of(config).documents(config), DOCUMENTS_AT_ONCE):
        flat = [token for ids in tokenizer.encode_batch(texts) for token in (*tokenizer.begin, *ids, tokenizer.eos)]
        parts.append(np.array(flat, dtype=dtype))
    return np.concatenate(parts)


def fingerprint(config: DataConfig, tokenizer: Tokenizer) -> str:
    """Changes whenever the token array would."""
    source = json.dumps([FORMAT_VERSION, asdict(config), tokenizer.backend.to_str()], sort_keys=True)
    return hashlib.sha256(source.encode()).hexdigest()[:16]
