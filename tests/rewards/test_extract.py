"""Where a response is cut into reasoning and summary."""

from __future__ import annotations

import pytest

from megatron_r1.rewards.extract import after_reasoning, split_reasoning


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
