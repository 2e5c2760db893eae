"""Filters at their limits: what each lets pass and what it drops, row by row."""

from __future__ import annotations

from functools import partial

import pytest

from megatron_r1.config.curate import CurateSourceConfig
from megatron_r1.config.run import RunConfig
from megatron_r1.data.row_files import BadRow
from megatron_r1.errors import ConfigError
from megatron_r1.recipe.candidate import Candidate, candidate_of
from megatron_r1.recipe.filters.agreement import disagreement
from megatron_r1.recipe.filters.build import build_filters
from megatron_r1.recipe.filters.finished import unfinished
from megatron_r1.recipe.filters.form import badly_formatted, leftover_tags, unreadable
from megatron_r1.recipe.filters.language import mixed_language
from megatron_r1.recipe.filters.length import bad_length
from megatron_r1.recipe.filters.reasoning import code_in_reasoning, long_paragraph, trivial_reasoning
from megatron_r1.recipe.filters.repetition import longest_loop, repeats_itself

SOURCE = CurateSourceConfig(path="rows.jsonl")
language = partial(mixed_language, share=1.0)
readable = partial(unreadable, text_share=0.35, longest_word=100)
repetition = partial(repeats_itself, ngram_size=20, share=0.4, times=4, words=24)


def row(response: str, question: str = "What is 2 + 3?", **fields) -> Candidate:
    return candidate_of({"question": question, "response": response} | fields, "s", SOURCE, "rows.jsonl:1", "1")


def thought(reasoning: str, summary: str = "5", question: str = "What is 2 + 3?") -> Candidate:
    return row(f"<think>{reasoning}</think>\n\n{summary}", question)


ENGLISH, CHINESE = "What is 2 + 3?", "2 + 3等于多少？"


@pytest.mark.parametrize(
    ("reasoning", "question"),
    [
        ("I add 2 km and 3 km, so $x = 5$ and f(x) = sin(x).", ENGLISH),
        ("A naïve café owner named Erdős adds α and β to get γ.", ENGLISH),
        ("The word 你好 means hello, and 好 alone means good.", "What does 你好 mean?"),
        ("Quadrilateral ABCD has the diagonal BD, as in NASA's drawing.", ENGLISH),
        ("在四边形ABCD中，AB = 3 cm，sin(A) = 0.5，所以面积是6。", CHINESE),
        ("Alice有2个苹果，Bob有3个，一共5个。", "Alice有2个苹果，Bob有3个，一共几个？"),
        ("用公式 \\frac{1}{2} \\times 3 就能算出来。", CHINESE),
        ("Two and three make five.", "用英文回答：2 + 3等于多少？"),
        ("2 + 3 = 5", ENGLISH),
        ("二加三等于五。", "2 + 3 = ?"),
    ],
)
def test_one_language_passes(reasoning, question) -> None:
    summary = "答案是5。" if "答" not in question and "等于五" in reasoning else "5"
    assert language(thought(reasoning, summary, question)) == ""


@pytest.mark.parametrize(
    ("reasoning", "summary", "question", "dropped"),
    [
        ("I am to translate.", "汤肉雪", "Translate to Chinese: soup meat snow", False),
        ("I am to translate.", "soup meat snow", "Translate to English: 汤肉雪", False),
        ("Snow is 雪, so that it reads 汤肉雪.", "汤肉雪", "Translate to Chinese: soup meat snow", False),
        ("把每个词翻译出来。", "The soup is hot.", "把“汤很热”翻译成英文。", False),
        ("I am to translate 然后我就写下来。", "汤肉雪", "Translate to Chinese: soup meat snow", True),
        ("I am to translate.", "汤 and 雪", "Translate to Chinese: soup or snow", True),
        ("I am to translate.", "汤肉雪", "Write soup meat snow.", True),
    ],
)
def test_a_translation_has_a_language_of_its_own(reasoning, summary, question, dropped) -> None:
    assert bool(language(thought(reasoning, summary, question))) == dropped


@pytest.mark.parametrize(
    ("reasoning", "summary", "question"),
    [
        ("I add both numbers 所以 I get five. " * 9, "5", ENGLISH),
        ("So it is five. Поэтому ответ верный.", "5", ENGLISH),
        ("足し算をします。", "5", ENGLISH),
        ("把两个数相加 therefore 得到五。", "5", CHINESE),
        ("I add both numbers and get five.", "5", CHINESE),
        ("I add both numbers and get five.", "答案是5。", ENGLISH),
        ("二加三等于五。", "The answer is 5.", CHINESE),
        ("Two and three make five.", "5", "Answer in Chinese: what is 2 + 3?"),
        ("四边形ABCD很大，WAIT，我再算一次。", "5", CHINESE),
    ],
)
def test_mixed_languages_are_dropped(reasoning, summary, question) -> None:
    assert language(thought(reasoning, summary, question))


@pytest.mark.parametrize(
    ("reasoning", "summary"),
    [
        ("2 + 3 = 5, and 5 - 3 = 2 as a check.", "The answer is 5."),
        ("The answer is 6. Wait, 2 + 3 = 5. So the answer is 5.", "\\boxed{5}"),
        ("The result is 3. Adding 2 gives five.", "5"),
        ("It is half of it, 0.5 of all.", "The answer is 50%."),
        ("Going down from 2 by 5 leaves 3 below zero.", "The answer is -3."),
        ("One sixth and a third.", "\\boxed{\\frac{1}{2}}"),
        ("The cost is $4 million.", "The answer is 4 million dollars."),
        ("It takes 12 200-kilobyte videos.", "The answer is 12."),
        ("It must be 1,250 in all.", "1250 pieces.\n\n<answer>1,250</answer>"),
        ("The sky scatters blue light.", "<answer>B</answer>"),
        ("", "The answer is 5."),
    ],
)
def test_a_summary_that_agrees_passes(reasoning, summary) -> None:
    assert disagreement(thought(reasoning, summary)) == ""


@pytest.mark.parametrize(
    ("reasoning", "summary", "why"),
    [
        ("2 + 3 = 5. So the answer is 5.", "\\boxed{6}", "its reasoning comes to 5"),
        ("所以答案是5。", "答案是6。", "its reasoning comes to 5"),
        ("2 + 3 = 5.", "The answer is 5, so \\boxed{6}", "its summary gives the answers 6 and 5"),
        ("2 + 3 = 5.", "The answer is 5.\n\n<answer>7</answer>", "its summary gives the answers 7 and 5"),
        ("2 + 3 = 5.", "The answer is 8.", "the answer 8 of its summary does not occur"),
        ("\\boxed{5}", "It is 50.", "its reasoning comes to 5"),
    ],
)
def test_a_summary_that_contradicts_is_dropped(reasoning, summary, why) -> None:
    assert why in disagreement(thought(reasoning, summary))


@pytest.mark.parametrize(
    ("text", "dropped"),
    [
        ("I define f(x) = x + 1 for all x.\nIf x > 0:\nlet y = f(x);\nthen y > 1.", False),
        ("From this, import taxes rise.\nfor each case:\nwe return to it.", False),
        ("```python\nprint(5)\n```", True),
        ("Let me run:\ndef f(x):\n    return x + 1\n", True),
        ("#include <stdio.h>\nint main() {\n", True),
        ("import math\nx = 3\nprint(math.sqrt(x))", True),
    ],
)
def test_code_in_the_reasoning(text, dropped) -> None:
    assert bool(code_in_reasoning(thought(text))) == dropped
    assert code_in_reasoning(thought("I write a program.", text)) == "", "code may be the answer"


@pytest.mark.parametrize(
    ("text", "dropped"),
    [
        ("It doubles: 1 * 2 = 2, 2 * 2 = 4, 4 * 2 = 8, 8 * 2 = 16, 16 * 2 = 32, 32 * 2 = 64.", False),
        ("The sequence 0 0 0 0 0 0 0 0 has eight zeros.", False),
        ("I check it. " * 3, False),
        ("I check it. " * 12, True),
        ("我再检查一遍。" * 6, True),
        ("1 + 1 = 2, " * 8, True),
        ("".join(f"{n} is a number that I look at now. " for n in range(40)), True),
    ],
)
def test_repetition(text, dropped) -> None:
    assert bool(repetition(thought(text))) == dropped


def test_the_longest_loop_is_found_wherever_it_starts() -> None:
    words = "a b c x y z x y z x y z x y z x d".split()
    assert longest_loop(words, 4) == (["x", "y", "z"], 13)
    assert longest_loop(words, 5) == ((), 0) and longest_loop([], 4) == ((), 0)


@pytest.mark.parametrize(
    ("response", "tags", "format_"),
    [
        ("<think>a b</think> <answer>5</answer>", "", ""),
        ("<think>a b</think>\n\nIt is 5.", "", ""),
        ("a b</think>\n\nIt is 5.", "", ""),
        ("<think>a b</think> It is <answer>5", "<answer>", ""),
        ("<think>a <answer>5</answer></think> 5", "<answer>", ""),
        ("<think>a b</think> 5<|im_end|>", "<|im_end|>", ""),
        ("<think>a b</think> 5 </think>", "</think>", "one think element"),
        ("So: <think>a b</think> 5", "", "one think element"),
        ("<think>a b</think> <answer> </answer>", "", "no summary"),
        ("It is 5.", "", "one think element"),
    ],
)
def test_format_and_leftover_tags(response, tags, format_) -> None:
    found = leftover_tags(row(response)), badly_formatted(row(response), "think")
    assert tags in found[0] and format_ in found[1]
    assert (bool(found[0]), bool(found[1])) == (bool(tags), bool(format_))


@pytest.mark.parametrize(("style", "passes"), [("strict", False), ("lenient", True), ("any", True)])
def test_other_formats(style, passes) -> None:
    assert bool(badly_formatted(row("<think>a</think> <answer>5"), style)) != passes


@pytest.mark.parametrize(
    ("response", "passes"),
    [
        ("<think>3 * 4 = 12</think> 12", True),
        ("<think>$\\frac{a}{b} = \\frac{1}{2}$</think> 1/2", True),
        ("<think>it is \ufffd5</think> 5", False),
        ("<think>it is \x075</think> 5", False),
        ("<think>" + "~#|@" * 99 + "</think> 5", False),
        ("<think>" + "a" * 101 + "</think> 5", False),
        ("<think>" + "很" * 300 + "</think> 5", True),
    ],
)
def test_readable(response, passes) -> None:
    assert bool(readable(row(response))) != passes


def test_length_and_end() -> None:
    assert bad_length(row("12345"), 5, 5) == "" and bad_length(row("1234"), 5, 0) and bad_length(row("123456"), 1, 5)
    assert unfinished(row("<think>a</think> 5", finish_reason="stop")) == "" == unfinished(row(""))
    assert unfinished(row("<think>a")) and unfinished(row("5", finish_reason="length"))


def test_reasoning_is_more_than_question_or_answer() -> None:
    trivial = partial(trivial_reasoning, fewest_words=5)
    assert trivial(thought("3 * 4 = 12, 2 + 12 = 14")) == ""
    assert [trivial(thought(text))[:13] for text in ("", "OK.", "What is 2+3 ?")] == [
        "has no reason", "its reasoning", "its reasoning",
    ]  # fmt: skip
    assert long_paragraph(thought("word " * 50 + "\n" + "word " * 50), 50) == ""
    assert long_paragraph(thought("很" * 51), 50)


def test_the_judge_needs_an_endpoint() -> None:
    config = RunConfig()
    config.curate.filters = ["judge"]
    with pytest.raises(ConfigError, match="reward.judge=0.0: must be above 0 with the filter judge"):
        build_filters(config)


def test_a_row_that_is_no_candidate_says_why() -> None:
    for content, why in (
        ({"question": " "}, "question is empty"),
        ({"question": "a", "truth": [1]}, "truth is neither"),
    ):
        with pytest.raises(BadRow, match=why):
            candidate_of(content, "s", SOURCE, "rows.jsonl:1", "1")
