"""The small rules: words and their languages, length, repetition, text and choices, boxes."""

from __future__ import annotations

import time

import pytest

from megatron_r1.data.prompts.prompts import Prompt
from megatron_r1.rewards.exact import chosen_letter, same_choice, same_text
from megatron_r1.rewards.extract import answer_of, boxed_answer
from megatron_r1.rewards.language import (
    LanguageReward,
    language_consistency,
    question_language,
    requested_language,
)
from megatron_r1.rewards.length import overlong
from megatron_r1.rewards.repetition import repetition
from megatron_r1.rewards.words import languages, words


def test_words_are_counted_by_script():
    assert words("Let x_1 = 3.5, so don't \\frac{a}{b}") == ["let", "x", "so", "don't", "a", "b"]
    assert words("\u6211\u4eec have 2 apples") == ["\u6211", "\u4eec", "have", "apples"]
    assert languages("caf\u00e9 \u043c\u0438\u0440 \u3042 \ud55c\uad6d one \u4e00") == {"other": 4, "en": 1, "zh": 1}
    assert words("abc\u4e2ddef") == ["abc", "\u4e2d", "def"] and words("12 + 3 = \\boxed{15}") == []


@pytest.mark.parametrize(
    ("text", "target", "share"),
    [
        ("<think>two plus two is four</think><answer>\u56db</answer>", "en", 1.0),
        ("<think>two plus two is \u56db</think><answer>4</answer>", "en", 0.8),
        ("<think>\u4e8c\u52a0\u4e8c</think> the answer", "zh", 1.0),
        ("\u4e8c\u52a0 two", "zh", 2 / 3),
        ("<think>2 + 2 = 4</think> four", "en", 0.0),
        ("", "en", 0.0),
        ("<think>left open \u56db", "en", 2 / 3),
        ("before <think>\u56db</think> after", "en", 0.0),
    ],
)
def test_language_is_the_share_of_words_in_the_reasoning(text, target, share):
    assert language_consistency(text, target) == pytest.approx(share)


def test_the_language_wanted_is_the_questions():
    assert question_language("What is 2 + 3?") == "en" == question_language("2 + 3 = ?")
    assert (
        question_language("\u8ba1\u7b97 x + 3")
        == "zh"
        == question_language("\u7528 Python \u5199\u4e00\u4e2a\u51fd\u6570")
    )


@pytest.mark.parametrize(
    ("text", "target", "share"),
    [
        ("\u8bbe $x = \\frac{abc}{2}$\uff0c\u5219 \\(\\sin y\\) \u4e3a\u6b63", "zh", 1.0),
        ("\u957f 3 cm\uff0c\u5bbd AB = 2x + y", "zh", 1.0),
        ("\u7531 f(x) = x^2 + bx \u5f97 \\[a = \\text{area}\\]", "zh", 1.0),
        ("\u7a0b\u5e8f\uff1a\n```python\nprint(total)\n```\n\u662f `sum(xs)`", "zh", 1.0),
        ("We have \\begin{align} \u4e00 &= 2 \\end{align} here", "en", 1.0),
        ("We know it and \u6240\u4ee5 x = 3", "en", 2 / 3),
        ("$x$ \\frac{1}{2} 2x+3", "en", 0.0),
        ("It costs $5 and the other costs $6", "en", 1.0),
    ],
)
def test_formulas_code_and_units_are_of_no_language(text, target, share):
    assert language_consistency(f"<think>{text}</think>", target) == pytest.approx(share)


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("What is 2 + 3? Please answer in Chinese.", "zh"),
        ("Explain your reasoning in English, then stop.", "en"),
        ("\u8bf7\u7528\u82f1\u6587\u56de\u7b54\uff1a1+1=?", "en"),
        ("Think step by step. \u7528\u4e2d\u6587\u601d\u8003", "zh"),
        ("Answer in English. No, answer in Chinese!", "zh"),
        ("In Chinese, please: what is 1+1?", "zh"),
        ("Who are the Chinese in English novels?", ""),
        ("Translate it into Chinese", ""),
    ],
)
def test_a_request_for_a_language_is_known(text, language):
    assert requested_language(text) == language
    system = LanguageReward("question", text)
    thought = "<think>\u4e8c\u52a0\u4e8c</think>"
    (value,) = system.score([Prompt("1", "two plus two?", "4", "", "number")], [thought])
    assert value == (1.0 if language == "zh" else 0.0)


def test_overlong_falls_in_a_straight_line():
    """DAPO, equation 13, with L_max = 20480 and L_cache = 4096."""
    lengths = (0, 16384, 16385, 18432, 20480, 20481, 10**6)
    assert [overlong(n, 20480, 4096) for n in lengths] == [0.0, 0.0, -1 / 4096, -0.5, -1.0, -1.0, -1.0]


def test_repetition_is_the_share_of_repeated_ngrams():
    assert repetition("a b c d e", 3) == 0.0 == repetition("", 3) == repetition("a a", 3)
    assert repetition("a b a b a b", 2) == pytest.approx(2 / 5 - 1)  # ab ba ab ba ab
    assert repetition("so it is " * 1000, 3) == pytest.approx(3 / 2998 - 1)
    assert repetition("\u662f\u7684" * 100, 2) == pytest.approx(2 / 199 - 1)


@pytest.mark.parametrize(
    "answer",
    ["B", "b", "(B)", "B.", "B)", "**B**", "$B$", "\\text{B}", "\\boxed{B}", "B) Paris", "B. 14", "The answer is B",
     "Option B", "answer: (b)", "[B]", "\\mathrm{B}.", "Final answer: B", "**Answer:** B", "The choice is **(B)**",
     "\uff22", "\u7b54\u6848\u662fB", "\u9009 B", "`B`"],
)  # fmt: skip
def test_one_letter_is_a_choice(answer):
    assert chosen_letter(answer) == "B" and same_choice(answer, "B") and not same_choice(answer, "C")


@pytest.mark.parametrize("answer", ["", "A cat", "AB", "B or C", "A, B", "B and C", "14", "none", "(B) (C)", "B)C"])
def test_not_one_letter_is_no_choice(answer):
    assert chosen_letter(answer) is None and not same_choice(answer, answer)


def test_text_is_equal_but_for_white_space():
    assert same_text(" a  b\n", "a b") and not same_text("A b", "a b") and not same_text("ab", "a b")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so \\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"),
        ("\\boxed{1} and again \\boxed{1}", "1"),
        ("\\boxed{1} or \\boxed{2}", None),
        ("<think>\\boxed{1}</think> \\boxed{2}", "2"),
        ("\\boxed{a \\boxed{b}}", "a \\boxed{b}"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{1", None),
        ("\\boxed{}", None),
        ("} \\boxed{3}", "3"),
        ("none", None),
    ],
)
def test_boxed_answers(text, answer):
    assert boxed_answer(text) == answer == answer_of(text, "boxed")


def test_where_an_answer_is_looked_for():
    text = "<answer>1</answer> \\boxed{2} 3"
    assert [answer_of(text, where) for where in ("tags", "boxed", "any")] == ["1", "2", "1"]
    assert [answer_of(" \\boxed{2} 3", where) for where in ("tags", "boxed", "any")] == [None, "2", "2"]
    assert [answer_of("it is 3", where) for where in ("tags", "boxed", "any")] == [None, None, "3"]


@pytest.mark.parametrize("text", ["\\boxed{" * 100_000, "{" * 10**6, "}" * 10**6, "a b " * 50_000, "\u4e00" * 200_000])
def test_huge_texts_are_quick(text):
    start = time.perf_counter()
    boxed_answer(text)
    language_consistency(text, "en")
    repetition(text, 20)
    chosen_letter(text)
    assert time.perf_counter() - start < 10.0
