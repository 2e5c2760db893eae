"""Rule rewards: the worked example, the forms of an answer, and answers that try to cheat."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_r1.config.data import DataConfig
from megatron_r1.config.reward import RewardConfig
from megatron_r1.data.prompts.prompts import Prompt
from megatron_r1.data.synthetic.arithmetic import worked_documents
from megatron_r1.rewards.exact import read_quantity, same_number
from megatron_r1.rewards.extract import any_answer, tagged_answer
from megatron_r1.rewards.format import format_reward
from megatron_r1.rewards.rubric_builder import build_rubric
from megatron_r1.rewards.score import Score

GOOD = "<think>3 * 4 = 12, 2 + 12 = 14</think> <answer>14</answer>"
EXAMPLE = (
    "<think>2 + 3 = 5, 5 * 4 = 20</think> <answer> 20</answer>",
    GOOD,
    "<answer>14</answer>",
    "<think>...gibberish...</think> <answer> 7<answer>",
)


def score(response: str, truth: str, config: RewardConfig) -> Score:
    """By the configured rubric, of a prompt whose answer is a number."""
    (found,) = build_rubric(config)([Prompt("train-0", "?", truth, "", "number")], [response])
    assert isinstance(found, Score)
    return found


def accuracy(response: str, truth: str) -> float:
    return score(response, truth, RewardConfig(format=0.0)).parts["accuracy"]


@pytest.mark.parametrize("style", ["lenient", "strict"])
def test_worked_example(style):
    scores = [score(response, "14", RewardConfig(format_style=style)) for response in EXAMPLE]
    last = 0.1 if style == "lenient" else 0.0
    assert [s.parts["accuracy"] for s in scores] == [0.0, 1.0, 1.0, 0.0]
    assert [s.parts["format"] for s in scores] == [0.1, 0.1, 0.0, last]
    assert [s.total for s in scores] == [0.1, 1.1, 1.0, last]


def test_weights_are_the_configs():
    assert score(GOOD, "14", RewardConfig(accuracy=2.0, format=1.0)).total == 3.0
    assert score(GOOD, "15", RewardConfig(accuracy=2.0, format=0.0)).total == 0.0


@pytest.mark.parametrize("same", ["14", "14.0", "+14", " 14\n", "014", "28/2", "$14$", "14.", "14\u3002", "14.00"])
def test_equal_numbers(same):
    assert same_number(same, "14") and accuracy(f"<answer>{same}</answer>", "14") == 1.0


@pytest.mark.parametrize(
    "other", ["", "15", "-14", "1 4", "14 15", "14 or 15", "the answer is 14", "1,4", "0x0e", "1e1", "14/0", "nan"]
)
def test_unequal_numbers(other):
    assert not same_number(other, "14") and accuracy(f"<answer>{other}</answer>", "14") == 0.0


def test_thousands_and_fractions():
    assert same_number("1,000", "1000") and same_number("-1/2", "-0.5") and not same_number("x", "x")
    assert read_quantity("\u0661\u0664") is None, "only ASCII digits are numbers"


@pytest.mark.parametrize(
    "response",
    [
        "14",
        "<think>14</think>",
        "The answer is 14.",
        "<answer>13</answer> <answer>14</answer>",
        "<answer>14</answer> <answer>13</answer>",
        "<answer>14<answer>13</answer>",
        "<think><answer>13</answer></think> <answer>14</answer>",
        "<answer>13</answer> 14",
        "<answer></answer>14",
        "<ANSWER>14</ANSWER>",
        "</answer>14<answer>",
        "<answer>1<think>4</answer>",
    ],
)
def test_not_an_answer(response):
    assert accuracy(response, "14") == 0.0


@pytest.mark.parametrize(
    "response", ["<answer>14</answer><answer>14</answer>", "<answer>14", "<answer> 14<answer>", "<answer>14</think>"]
)
def test_one_answer_however_badly_tagged(response):
    assert accuracy(response, "14") == 1.0


@pytest.mark.parametrize(
    "response",
    [
        "",
        GOOD + GOOD,
        GOOD + " more",
        "so " + GOOD,
        "<think>a</think> b <answer>1</answer>",
        "<think>a<answer>1</answer></think>",
        "<answer>1</answer> <think>a</think>",
        "<think></think> <answer>1</answer>",
        "<think> \n</think> <answer>1</answer>",
        "<think>a</think> <answer> </answer>",
        "<think>a <answer>1</answer>",
        "<think><think>a</think> <answer>1</answer>",
        "<think>a</think> <answer>1",
    ],
)
def test_strict_format_refuses(response):
    assert format_reward(response, "strict") == 0.0


def test_format_accepts():
    for response in (
        GOOD,
        f" \n{GOOD}\n",
        "<think>a</think><answer>b</answer>",
        "<think>\n< 3 >\n</think>\n<answer>x</answer>",
    ):
        assert format_reward(response, "strict") == format_reward(response, "lenient") == 1.0
    for response in ("so <think>a</think> hence <answer>1", "<think>a</think> <answer>1<answer>"):
        assert (format_reward(response, "strict"), format_reward(response, "lenient")) == (0.0, 1.0)
    for response in (
        "<think>a <answer>1",
        "<answer>1</answer>",
        "<think></think> <answer>1",
        "<think>a</think> <answer>",
    ):
        assert format_reward(response, "lenient") == 0.0


def test_a_tag_that_the_prompt_opened_is_part_of_the_format():
    for response in ("2 + 3 = 5\n</think>\n<answer>5</answer>", "so</think><answer>5</answer>"):
        for style in ("strict", "lenient"):
            assert (format_reward(response, style), format_reward(f"<think>\n{response}", style)) == (0.0, 1.0)
    assert format_reward("<think>\n</think> <answer>5</answer>", "strict") == 0.0


def test_unknown_style_is_refused():
    with pytest.raises(ValueError, match="lenient"):
        format_reward(GOOD, "loose")


def test_any_answer_reads_every_document():
    for document in worked_documents(DataConfig(num_documents=2000)):
        assert same_number(any_answer(document.response) or "", str(document.answer)), document.response
        assert (tagged_answer(document.response) is not None) == (document.style == "think")


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("The answer is 14, I think; not 15", "14"),
        ("\\boxed{13} no, \\boxed{14}", "14"),
        ("so 2 + 12 = 14", "14"),
        ("\u7b54\u6848\u662f\uff1a14\u3002", "14"),
        ("the answer is unknown", None),
        ("<answer>1</answer><answer>2</answer> 3", None),
        ("", None),
    ],
)
def test_any_answer(response, answer):
    assert any_answer(response) == answer


@pytest.mark.parametrize(
    "response",
    [
        "<answer>" + "9" * 1_000_000 + "</answer>",
        "<answer>" + "9" * 40 + "/" + "9" * 1_000_000,
        "<answer>" * 100_000,
        "<think>" * 100_000 + "<answer>14",
        "<think>" + "<" * 1_000_000,
        "1," * 500_000,
        "answer is " * 100_000,
        "\\boxed{" * 100_000,
        "<answer>" + " " * 1_000_000 + "14",
        "-" * 1_000_000,
    ],
    ids=range(10),
)
def test_huge_responses_are_quick(response):
    start = time.process_time()  # of this process, however busy the machine is
    any_answer(response)
    score(response, "14", RewardConfig())
    score(response, "14", RewardConfig(format_style="lenient"))
    assert time.process_time() - start < 2.0


FRAGMENTS = st.sampled_from(
    ["<think>", "</think>", "<answer>", "</answer>", "14", "13", " ", "\n", "\\boxed{", "}", "-", "/", "0"]
)


@given(st.lists(FRAGMENTS).map("".join) | st.text())
def test_any_text_has_a_score_in_range(response):
    strict, lenient = (score(response, "14", RewardConfig(format_style=style)) for style in ("strict", "lenient"))
    assert 0.0 <= strict.total <= lenient.total <= 1.1
    assert strict.parts["accuracy"] == lenient.parts["accuracy"] in (0.0, 1.0)
    if strict.parts["accuracy"]:
        assert "<answer>" in response
