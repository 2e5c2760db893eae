"""Results of responses: shares over prompts, votes by the verifier's own equality, behaviour."""

import pytest

from megatron_r1.config.reward import RewardConfig
from megatron_r1.data.prompts.prompts import Prompt
from megatron_r1.evaluation.benchmarks import BENCHMARKS
from megatron_r1.evaluation.summary import EvaluatedResponse, ModeScores
from megatron_r1.evaluation.voting import Votes

EIGHT = Prompt("p0", "What is 3 + 5?", "8", "", "number")
HALF = Prompt("p1", "Half of 1?", "\\frac{1}{2}", "", "math")
CHOICE = Prompt("p2", "A or B?", "B", "", "choice")


def tagged(answer):
    return EvaluatedResponse(f"<think>so</think> <answer>{answer}</answer>", 12, False)


def said(text, tokens=5):
    return EvaluatedResponse(text, tokens, tokens > 100)


@pytest.fixture(scope="module")
def measures():
    with BENCHMARKS["arithmetic"].measures(RewardConfig()) as found:
        yield found


@pytest.fixture(scope="module")
def found(measures):
    responses = [
        [tagged("8"), said("It is 8."), tagged("7"), said("wait, but it must be 7.0", 101)],
        [tagged("0.5"), tagged("1/2"), tagged("\\frac{2}{3}"), tagged("2/3")],
        [tagged("B"), tagged("(b)"), said("the answer is A"), said("\u4e0d\u77e5\u9053 nothing at all")],
    ]
    return ModeScores(measures, [EIGHT, HALF, CHOICE], responses, ["", "", ""])


def means(values):
    return {name: round(value["mean"], 6) for name, value in values.items()}


def test_means_are_pass_at_1_averaged_over_samples_blind_and_strict(found):
    assert means(found.means()) == {
        "correct_any_format": 0.5,
        "correct_tagged": round(5 / 12, 6),
        "format": round(8 / 12, 6),
        "language": round((11 + 1 / 2) / 12, 6),
    }
    assert found.means()["correct_any_format"]["mean"] == found.pass_at_k()["correct_any_format"]["1"]["mean"]
    assert means(found.by_task()) == {"choice": 0.5, "math": 0.5, "number": 0.5}


def test_pass_at_k_has_every_format(found):
    # 2 of 4 correct each: 1 - C(2, 2) / C(4, 2) = 5/6; strict, one prompt has 1 of 4: 1 - C(3, 2) / 6 = 1/2.
    by_k = {metric: means(values) for metric, values in found.pass_at_k().items()}
    assert by_k["correct_any_format"] == {"1": 0.5, "2": round(5 / 6, 6), "4": 1.0}
    assert by_k["correct_tagged"]["2"] == round((5 / 6 + 5 / 6 + 1 / 2) / 3, 6)


def test_votes_count_equal_answers_as_one(measures, found):
    votes = [
        measures.count_votes(prompt, [response.text for response in group], right)
        for prompt, group, right in zip([EIGHT, HALF, CHOICE], found.responses, found.main, strict=True)
    ]
    assert votes[:2] == [Votes(2, (2,), 0), Votes(2, (2,), 0)]  # 7 and 7.0; 2/3 in LaTeX and plain
    assert votes[2].correct == 2 and sum(votes[2].wrong) + votes[2].abstained == 2
    assert means(found.cons_at_k())["4"] == round((1 / 2 + 1 / 2 + 1) / 3, 6)


def test_programs_have_no_vote(measures):
    prompt = Prompt("c", "Write f.", '{"language": "python", "inputs": ["1"], "outputs": ["1"]}', "", "code")
    assert measures.count_votes(prompt, ["x"], [0.0]) is None


def test_behaviour_is_that_of_the_responses(found):
    behaviour = found.behaviour()
    assert means(behaviour) == {
        "mixed_language": round(1 / 12, 6),
        "response_length": round((12 * 8 + 5 * 3 + 101) / 12, 6),
        "reflection_words": round(2 / 12, 6),
        "truncated": round(1 / 12, 6),
    }
    assert all(value["low"] <= value["mean"] <= value["high"] for value in behaviour.values())
