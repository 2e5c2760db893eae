"""Where a response is cut: helpfulness must not read reasoning, harmlessness must read all of it."""

from __future__ import annotations

import pytest

from megatron_r1.rewards.extract import split_reasoning
from megatron_r1.rewards.summary import READS


@pytest.mark.parametrize(
    ("response", "reasoning", "summary"),
    [
        ("<think>a</think> <answer>b</answer>", "a", "b"),
        ("<think>a</think> b", "a", " b"),
        ("a</think>b", "a", "b"),
        ("<think>a", "a", ""),
        ("b", "", "b"),
        ("", "", ""),
        ("<answer>b</answer>", "", "b"),
        ("<answer>b", "", "b"),
        ("<think>a</think>x</think>b", "a</think>x", "b"),
        ("<think><answer>a</answer></think><answer>b</answer>", "<answer>a</answer>", "b"),
        ("<answer>a</answer> or <answer>b</answer>", "", "b"),
    ],
)
def test_parts(response, reasoning, summary):
    assert split_reasoning(response).reasoning == reasoning
    assert READS["summary"](response) == summary
    assert READS["response"](response) == response
