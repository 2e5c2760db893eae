"""The corpus is addressed by position and visits every sequence once an epoch."""

from dataclasses import replace

import numpy as np
import pytest

from megatron_r1.config.data import DataConfig
from megatron_r1.data.pretraining.corpus import Corpus, build_corpus, tokenise
from megatron_r1.data.synthetic.arithmetic import documents
from megatron_r1.data.synthetic.train_tokenizer import train_tokenizer
from megatron_r1.errors import DataError

CONFIG = DataConfig(num_documents=400)
TOKENIZER = train_tokenizer(CONFIG)


def counting(sequences=37, length=8, seed=0, extra=3):
    return Corpus(np.arange(sequences * length + 1 + extra, dtype=np.int32), length, seed)


def test_sequences_are_neighbouring_tokens():
    rows = counting().batch(0, 5)
    assert rows.shape == (5, 9) and rows.dtype == np.int64
    assert (np.diff(rows, axis=1) == 1).all() and not (rows[:, 0] % 8).any()


@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_every_sequence_is_visited_once_an_epoch(epoch):
    corpus = counting()
    starts = corpus.batch(epoch * 37, 37)[:, 0]
    assert sorted(starts) == [8 * i for i in range(37)]


def test_epochs_and_seeds_differ_in_order():
    first, second = counting().batch(0, 37), counting().batch(37, 37)
    assert (first != second).any()
    assert (first != counting(seed=1).batch(0, 37)).any()


def test_batches_depend_on_position_alone():
    corpus = counting()
    whole = corpus.batch(0, 100)
    for position, size in ((90, 10), (30, 20), (0, 1), (36, 2)):
        assert (corpus.batch(position, size) == whole[position : position + size]).all()


def test_tokens_are_the_documents_between_begin_and_end():
    tokens = tokenise(CONFIG, TOKENIZER)
    assert tokens.dtype == np.uint16
    texts = TOKENIZER.decode(tokens).split("<|bos|>")[1:]
    assert texts == [text + "<|eos|>" for text in documents(CONFIG)]


def test_build_caches_by_what_it_was_built_from(tmp_path):
    corpus = build_corpus(CONFIG, TOKENIZER, 64, 0, tmp_path)
    assert isinstance(corpus.tokens, np.memmap)
    (file,) = tmp_path.iterdir()
    before = file.stat().st_mtime_ns
    again = build_corpus(CONFIG, TOKENIZER, 32, 1, tmp_path)
    assert file.stat().st_mtime_ns == before and (again.tokens == corpus.tokens).all()
    build_corpus(replace(CONFIG, seed=1), TOKENIZER, 64, 0, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_too_short_a_corpus_is_refused():
    with pytest.raises(DataError, match="sequence_length=8"):
        Corpus(np.arange(8), 8, 0)
