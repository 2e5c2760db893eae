"""N-gram matching against looking at every pair of n-grams, and what counts as a word."""

from __future__ import annotations

import random

import pytest

from megatron_r1.data.prepare.decontaminate import Evaluation, NgramIndex

TEN = "one two three four five six seven eight nine ten"


def index_of(*texts, n=10):
    return NgramIndex([Evaluation(f"e:{number}", text) for number, text in enumerate(texts, 1)], n)


def test_agrees_with_comparing_every_ngram():
    chance = random.Random(0)

    def text():
        return " ".join(chance.choices("abcd", k=chance.randint(0, 30)))

    def ngrams(text, n):
        words = text.split()
        return {tuple(words[start : start + n]) for start in range(len(words) - n + 1)}

    matched = 0
    for n in (2, 4, 6):
        evaluations, texts = [text() for _ in range(20)], [text() for _ in range(300)]
        known = set().union(*(ngrams(evaluation, n) for evaluation in evaluations))
        found = index_of(*evaluations, n=n).matches(texts)
        assert set(found) == {index for index, one in enumerate(texts) if ngrams(one, n) & known}
        for index, reason in found.items():
            owner = int(reason.rpartition(":")[2])
            assert ngrams(texts[index], n) & ngrams(evaluations[owner - 1], n)
        matched += len(found)
    assert 100 < matched < 890


@pytest.mark.parametrize(
    ("text", "matches"),
    [
        (TEN, True),
        (f"Before. {TEN.upper().replace(' ', ', ')}! After", True),
        (TEN.replace("ten", "eleven"), False),
        (TEN.replace("five", "fife"), False),
        (TEN.removesuffix(" ten"), False),
        (" ".join(reversed(TEN.split())), False),
        ("", False),
    ],
)
def test_case_and_punctuation_do_not_count_and_ten_words_do(text, matches):
    found = index_of("nothing of the kind is in this text of more than ten words", TEN).matches(["other", text])
    assert found == ({1: "shares 10 words in a row with e:2"} if matches else {})


def test_ngrams_end_with_their_text():
    first, second = "one two three four five", "six seven eight nine ten"
    assert index_of(TEN).matches([first, second]) == {}
    assert index_of(f"{first} a b c d e", f"z y x w v {second}").matches([TEN]) == {}


def test_chinese_counts_by_character():
    index = index_of("小明有十二个苹果，他吃了三个。")
    assert index.matches(["昨天小明有十二个苹果他吃完了", "小红有十二个梨"]) == {0: "shares 10 words in a row with e:1"}


def test_texts_too_short_to_match_are_named():
    index = index_of("too short", TEN)
    assert index.too_short == ["e:1"] and len(index) == 1
    assert index_of().matches([TEN]) == {} and len(index_of("short")) == 0
