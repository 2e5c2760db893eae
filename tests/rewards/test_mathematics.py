"""Answers as mathematics: forms of one value, units, several answers at once; GSM8K against itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_r1.rewards.exact import same_number
from megatron_r1.rewards.mathematics import at_once
from megatron_r1.rewards.normalise import balanced, normalised

GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k" / "test.jsonl"


@pytest.mark.parametrize(
    ("truth", "answer", "right"),
    [
        ("14", "14", True),
        ("14", "$14$", True),
        ("14", "\\boxed{14}", True),
        ("14", "$$\\boxed{14.0}$$", True),
        ("14", "\\(14\\)", True),
        ("14", "14 cm", True),
        ("14", "14\\text{ cm}", True),
        ("14", "$14", True),
        ("14", "\\$14", True),
        ("14", "\u20ac 14", True),
        ("14", "14 red apples.", True),
        ("14 cm", "14 cm", True),
        ("14 cm", "14", True),
        ("50", "50\\%", True),
        ("50\\%", "50%", True),
        ("0.5", "50\\%", True),
        ("0.5", "0.5\\%", False),
        ("50\\%", "0.5", True),
        ("14 cm", "14 m", False),
        ("14", "15 cm", False),
        ("1000", "1,000", True),
        ("14", "14 or 15", None),
        ("14", "14\n15", None),
        ("14", "14\ntrue", None),
        ("14", "x", None),
        ("\\frac{1}{2}", "0.5", True),
        ("\\sqrt{4}", "2", None),
    ],
)
def test_numbers_are_compared_without_a_worker(truth, answer, right):
    assert at_once(normalised(answer), normalised(truth)) is right


@pytest.mark.parametrize(
    ("truth", "answers", "wrong"),
    [
        ("1/2", ["\\frac{1}{2}", "\\frac12", "0.5", "\\dfrac{2}{4}", "2^{-1}"], ["\\frac{1}{3}", "2", "1, 2", "1 2"]),
        ("2\\sqrt{3}", ["\\sqrt{12}", "$2 \\sqrt 3$", "\\sqrt{3} \\cdot 2"], ["2\\sqrt{2}", "-2\\sqrt{3}", "3.4641"]),
        ("x^2+2x+1", ["(x+1)^2", "1 + 2x + x^2"], ["(x-1)^2", "x^2 + 1"]),
        ("(1, 2)", ["(1,2)", "\\left(1, 2\\right)"], ["(2, 1)", "1"]),
        ("\\{1, 2\\}", ["\\{2, 1\\}"], ["\\{1\\}", "\\{1, 3\\}"]),
        ("\\frac{\\pi}{2}", ["\\pi/2", "0.5\\pi"], ["\\pi", "1.5"]),
        (
            "14",
            ["x = 14", "7 + 7", "7 + 7 = 14"],
            ["14 or 15", "\\{13, 14\\}", "13 = 14", "14 \\lor 15", "13} \\boxed{14"],
        ),
    ],
)
def test_expressions(verifier, truth, answers, wrong):
    verdicts = verifier.verdicts([*answers, *wrong], [truth] * (len(answers) + len(wrong)))
    expected = [True] * len(answers) + [False] * len(wrong)
    assert dict(zip(answers + wrong, verdicts, strict=True)) == dict(zip(answers + wrong, expected, strict=True))
    assert verifier.pool.killed == 0


def test_no_answer_is_wrong(verifier):
    assert verifier.verdicts([None, "", " ", "$$", "1" * 2000], ["1" * 2000] * 5) == [False] * 5


def test_braces_have_partners():
    assert balanced("a{b}\\{") and not balanced("}{") and not balanced("{") and balanced("\\}")


@pytest.mark.skipif(not GSM8K.is_file(), reason=f"GSM8K is not there: {GSM8K}")
def test_gsm8k(verifier):
    """Every answer is correct for its own problem, and for the next one only where that has the same number."""
    rows = [json.loads(line)["answer"] for line in GSM8K.read_text(encoding="utf-8").splitlines()]
    truths = [row.rpartition("####")[2].strip() for row in rows]
    assert len(truths) == 1319
    assert all(right is True for right in verifier.verdicts(truths, truths))
    following = truths[1:] + truths[:1]
    equal = [same_number(one, other) for one, other in zip(truths, following, strict=True)]
    assert verifier.verdicts(truths, following) == equal and 0 < sum(equal) < 100
    # The same through math-verify itself, in forms that no number has.
    forms = [f"\\frac{{{truth.replace(',', '')} \\cdot 3}}{{3}}" for truth in truths[::10]]
    assert all(right is True for right in verifier.verdicts(forms, truths[::10]))
    assert verifier.verdicts(forms, following[::10]) == equal[::10]
