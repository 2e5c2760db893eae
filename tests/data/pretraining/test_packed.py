"""Packed and blended shards as batches: addressed by position, every document once an epoch, damage refused."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from megatron_r1.config.data import DataConfig, DatasetConfig, IndexedConfig
from megatron_r1.data.pretraining.packed import packed_corpus, tokenizer_folder
from megatron_r1.data.synthetic.train_tokenizer import train_tokenizer
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import ConfigError, DataError
from tests.support.texts import some_texts, write_shards

LENGTH = 64
TOKENIZER = train_tokenizer(DataConfig(num_documents=200))


def documents_of(count, seed):
    return [[TOKENIZER.bos, *TOKENIZER.encode(text), TOKENIZER.eos] for text in some_texts(count, seed, longest=12)]


DOCUMENTS = documents_of(150, 0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("shards")
    write_shards(root / "a", DOCUMENTS, TOKENIZER)
    write_shards(root / "b", documents_of(50, 1), TOKENIZER)
    return root


def config_of(folders, **weights):
    return IndexedConfig(
        datasets={name: DatasetConfig(path=str(folders / name), weight=w) for name, w in weights.items()}
    )


def pieces_of(batch):
    """Token ids of every piece of a batch, with whether it begins a document."""
    for tokens_L, document_ids_L, begins_L in zip(batch.tokens_BL, batch.document_ids_BL, batch.begins_BL, strict=True):
        for number in range(1, document_ids_L.max() + 1):
            yield tuple(tokens_L[document_ids_L == number]), bool(begins_L[document_ids_L == number][0])


def test_an_epoch_holds_every_document_once(folders):
    corpus = packed_corpus(config_of(folders, a=1.0), TOKENIZER, LENGTH, 0)
    sequences = len(corpus.datasets[0].packing)
    for epoch in (0, 3):
        batch = corpus.batch(epoch * sequences, sequences)
        assert batch.tokens_BL.shape == (sequences, LENGTH + 1) and batch.tokens_BL.dtype == np.int64
        found = Counter(pieces_of(batch))
        expected: Counter = Counter()
        for document in DOCUMENTS:
            starts = range(0, len(document) - 1, LENGTH)
            expected.update((tuple(document[start : start + LENGTH + 1]), start == 0) for start in starts)
        assert found == expected
        assert any(not begins for _, begins in expected)
        assert (batch.tokens_BL[batch.document_ids_BL == 0] == TOKENIZER.pad).all()
    assert (corpus.batch(0, sequences).tokens_BL != corpus.batch(sequences, sequences).tokens_BL).any()


def test_batches_depend_on_position_alone(folders):
    corpus, fresh = (packed_corpus(config_of(folders, a=2.0, b=1.0), TOKENIZER, LENGTH, 0) for _ in range(2))
    whole = corpus.batch(0, 200)
    for position, size in ((190, 10), (30, 20), (0, 1), (99, 3)):
        part = fresh.batch(position, size)
        for name in ("tokens_BL", "document_ids_BL", "begins_BL"):
            assert (getattr(part, name) == getattr(whole, name)[position : position + size]).all()
    other = packed_corpus(config_of(folders, a=2.0, b=1.0), TOKENIZER, LENGTH, 1)
    assert (other.batch(0, 200).tokens_BL != whole.tokens_BL).any()


def test_datasets_are_blended_by_weight(folders):
    batch = packed_corpus(config_of(folders, a=3.0, b=1.0), TOKENIZER, LENGTH, 0).batch(0, 10_000)
    marks = [TOKENIZER.decode(piece).startswith("<|bos|>1-") for piece, begins in pieces_of(batch) if begins]
    rows = [TOKENIZER.decode(row).count("<|bos|>1-") > 0 for row in batch.tokens_BL[:500]]
    assert any(marks) and 0.2 < np.mean(rows) < 0.3


def test_the_tokenizer_is_the_datasets_own(folders, tmp_path):
    config = config_of(folders, a=1.0)
    assert Tokenizer.load(tokenizer_folder(config)).fingerprint() == TOKENIZER.fingerprint()
    other = train_tokenizer(DataConfig(num_documents=300, vocab_size=600))
    write_shards(tmp_path / "c", DOCUMENTS, other)
    config.datasets["c"] = DatasetConfig(path=str(tmp_path / "c"))
    with pytest.raises(
        ConfigError, match=r"data\.indexed\.datasets\.c\.path=.*must be tokenised with the tokenizer of"
    ):
        packed_corpus(config, TOKENIZER, LENGTH, 0)


def test_unfinished_empty_and_damaged_folders_are_refused(tmp_path):
    write_shards(tmp_path / "a", DOCUMENTS, TOKENIZER)
    write_shards(tmp_path / "empty", [[1]], TOKENIZER)
    with pytest.raises(DataError, match="holds no document of two tokens"):
        packed_corpus(config_of(tmp_path, empty=1.0), TOKENIZER, LENGTH, 0)
    raw = bytearray((tmp_path / "a/shard-00000.bin").read_bytes())
    raw[100] ^= 1
    (tmp_path / "a/shard-00000.bin").write_bytes(raw)
    config = config_of(tmp_path, a=1.0)
    with pytest.raises(DataError, match=r"shard-00000\.bin: has SHA-256"):
        packed_corpus(config, TOKENIZER, LENGTH, 0)
    config.verify_hashes = False
    packed_corpus(config, TOKENIZER, LENGTH, 0)
    (tmp_path / "a/manifest.json").unlink()
    with pytest.raises(DataError, match=r"holds no manifest\.json"):
        packed_corpus(config, TOKENIZER, LENGTH, 0)
