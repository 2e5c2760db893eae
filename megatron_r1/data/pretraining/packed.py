"""Tokenised, packed and blended documents, read by position.

A position is the number of sequences consumed since the start of training; it alone decides which sequence comes next,
so a resume needs one number. Every epoch of a dataset visits each of its sequences once, in an order of its own.

Shapes: B sequences, L inputs of each; a sequence has L + 1 tokens, the last one a target only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_r1.config.data import IndexedConfig
from megatron_r1.data.packing import pack
from megatron_r1.data.pretraining.blend import Blend
from megatron_r1.data.pretraining.shards import TOKENIZER, Shards, open_shards
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import ConfigError, DataError


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Sequences of whole and cut documents."""

    tokens_BL: np.ndarray
    """Token ids, padded on the right: int64 [B, L + 1]."""
    document_ids_BL: np.ndarray
    """Number of the document, or piece of one, that each token belongs to, from 1 in each sequence; 0 is padding."""
    begins_BL: np.ndarray
    """Whether a token is the first of a document: bool."""


class PackedDataset:
    """One folder of shards as sequences.

    Args:
        shards: its documents.
        sequence_length: inputs per sequence, L.
        pad: token that fills up a sequence.
        seed: of the order of documents in a sequence, and of sequences in an epoch.
    """

    def __init__(self, shards: Shards, sequence_length: int, pad: int, seed: int):
        self._shards, self._pad, self._seed, self._width = shards, pad, seed, sequence_length + 1
        self.packing = pack(shards.lengths, self._width, seed)
        if not len(self.packing):
            raise DataError(f"{shards.folder}: holds no document of two tokens or more")
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    def fill(self, position: int, tokens_L: np.ndarray, document_ids_L: np.ndarray, begins_L: np.ndarray) -> None:
        """Write sequence `position` of the endless series of epochs into one row of a batch."""
        packing = self.packing
        epoch, index = divmod(position, len(packing))
        if self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng([self._seed, epoch]).permutation(len(packing)))
        sequence = int(self._order[1][index])
        first, end = packing.first_piece_S[sequence : sequence + 2].tolist()
        at = 0
        for number, piece in enumerate(range(first, end), 1):
            start, stop = int(packing.start_P[piece]), int(packing.stop_P[piece])
            tokens_L[at : at + stop - start] = self._shards.tokens(int(packing.document_P[piece]), start, stop)
            document_ids_L[at : at + stop - start] = number
            begins_L[at] = start == 0
            at += stop - start
        tokens_L[at:] = self._pad


class PackedCorpus:
    """Packed datasets, blended.

    Args:
        datasets: one or more.
        weights: share of each, in sequences.
        sequence_length: inputs per sequence, L.
        seed: of the blend.
    """

    def __init__(self, datasets: Sequence[PackedDataset], weights: Sequence[float], sequence_length: int, seed: int):
        self.datasets, self._width = datasets, sequence_length + 1
        self._blend = Blend(weights, seed)

    def batch(self, position: int, size: int) -> PackedBatch:
        """Sequences `position` to `position + size - 1` of the endless blend."""
        shape = (size, self._width)
        batch = PackedBatch(np.empty(shape, np.int64), np.zeros(shape, np.int64), np.zeros(shape, bool))
        for row in range(size):
            dataset, index = self._blend.at(position + row)
            self.datasets[dataset].fill(index, batch.tokens_BL[row], batch.document_ids_BL[row], batch.begins_BL[row])
        return batch


def tokenizer_folder(config: IndexedConfig) -> Path:
    """Where the tokenizer of the first dataset is; `packed_corpus` checks that all datasets have the same."""
    return Path(next(iter(config.datasets.values())).path) / TOKENIZER


def packed_corpus(config: IndexedConfig, tokenizer: Tokenizer, sequence_length: int, seed: int) -> PackedCorpus:
    """Open, verify, pack and blend the datasets of a config.

    Raises:
        ConfigError: a dataset was tokenised with another tokenizer.
        DataError: a dataset is unfinished or damaged.
    """
    datasets = []
    for name, dataset in config.datasets.items():
        shards = open_shards(Path(dataset.path), config.verify_hashes)
        if shards.manifest["plan"]["tokenizer"] != tokenizer.fingerprint():
            key = f"data.indexed.datasets.{name}.path"
            raise ConfigError(key, dataset.path, "must be tokenised with the tokenizer of this run")
        datasets.append(PackedDataset(shards, sequence_length, tokenizer.pad, seed))
    weights = [dataset.weight for dataset in config.datasets.values()]
    return PackedCorpus(datasets, weights, sequence_length, seed)
