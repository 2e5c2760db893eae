"""Where a response is cut into reasoning and summary, and where its answer begins and ends."""

from __future__ import annotations

import time

import pytest

from megatron_r1.rewards.extract import after_reasoning, answer_of, split_reasoning


@pytest.mark.parametrize(
    ("response", "reasoning", "summary"),
    [
        ("", "", ""),
        ("no tags", "", "no tags"),
        ("<think>so</think>\nit is 5", "so", "\nit is 5"),
        ("first <think>so</think> 5", "first so", " 5"),
        ("the prompt opened it</think> 5", "the prompt opened it", " 5"),
        ("<think>never closed <answer>5</answer>", "never closed <answer>5</answer>", ""),
        ("first <think>never closed", "first never closed", ""),
        ("<think></think>5", "", "5"),
        ("<think>one</think> and <think>two</think> 5", "one</think> and <think>two", " 5"),
        ("<think>one</think> and <think>two", "one", " and <think>two"),
        ("</think>", "", ""),
    ],
)
def test_reasoning_ends_at_the_last_closing_tag(response, reasoning, summary):
    assert split_reasoning(response) == (reasoning, summary)
    if "</think>" in response:
        assert after_reasoning(response) == summary


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("<answer>x<5</answer>", "x<5"),
        ("<think>so</think> <answer>1 < x < 3</answer>", "1 < x < 3"),
        ("<answer>a<b and c</d></answer>", "a<b and c</d>"),
        ("<answer>x \\le 5, y<2", "x \\le 5, y<2"),
        ("<answer>x<5<answer>", "x<5"),
        ("<answer>if (a<b) return a;</answer> more", "if (a<b) return a;"),
        ("<answer>3<think>4</answer>", "3"),
    ],
)
def test_an_answer_element_ends_at_a_tag_and_at_no_other_less_than_sign(response, answer):
    assert [answer_of(response, where) for where in ("tags", "any")] == [answer, answer]


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("so \\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"),
        ("\\boxed{\\text{a } \\{1, \\sqrt{2}\\}} is it", "\\text{a } \\{1, \\sqrt{2}\\}"),
        ("<think>\\boxed{1}</think> it is \\boxed{x^{2}}", "x^{2}"),
        ("\\boxed 5", "5"),
        ("\\fbox{7}", "7"),
        ("\\boxed {8}", "8"),
    ],
)
def test_a_box_ends_at_its_own_brace_in_training_and_evaluation(response, answer):
    assert [answer_of(response, where) for where in ("boxed", "any")] == [answer, answer]


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("The answer is \\frac{1}{2}.", "\\frac{1}{2}"),
        ("The answer is $x^2+1$.", "x^2+1"),
        ("Thus the answer is 2^{10}", "2^{10}"),
        ("the answer is (1, 2).", "(1, 2)"),
        ("the answer is [1, 2), as said", "[1, 2)"),
        ("The final answer is **42**.", "42"),
        ("**Answer:** B", "B"),
        ("the answer is 5 apples", "5"),
        ("the answer is 3 or 4", "3 or 4"),
        ("the answer is x = 5.", "x = 5"),
        ("\u7b54\u6848\u4e3a12\u4e2a", "12\u4e2a"),
        ("She pays $18 every day.", "$18"),
        ("first $5 and then $6", "$6"),
        ("we get 2^10", "2^10"),
        ("so $x = \\frac{3}{4}$", "\\frac{3}{4}"),
        ("it is \\frac{3}{4} then", "\\frac{3}{4}"),
        ("it rises by 5%", "5%"),
        ("it is 3/4", "3/4"),
        ("some work\n#### 1,080", "1,080"),
        ("so 2 + 12 = 14", "14"),
        ("12 cm^2", "12"),
        ("it is 7, and x_1 and H2O", "7"),
    ],
)
def test_a_value_is_taken_whole(response, answer):
    assert answer_of(response, "any") == answer


@pytest.mark.parametrize(
    "response", ["at 12:30", "version 1.2.3", "3 - 5", "a-1", "2024-05-06", "x_1", "2x + 3y", "H2O"]
)
def test_no_value_is_cut_out_of_something_larger(response):
    assert answer_of(response, "any") is None


@pytest.mark.parametrize(
    "part", ["$ a", "\\(", "\\[", "$$", "answer is 1 1", "1 1/1", "1,111", "\\boxed ", "- 1 ", "####\n"]
)
def test_any_format_is_linear(part):
    start = time.process_time()
    answer_of(part * (500_000 // len(part)), "any")
    assert time.process_time() - start < 2.0
