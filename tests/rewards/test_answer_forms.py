"""Right and wrong answers in many forms: none that is wrong is accepted, hardly any that is right is refused."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from megatron_r1.config.reward import RewardConfig
from megatron_r1.data.prompts.prompts import Prompt
from megatron_r1.rewards.accuracy import Accuracy
from megatron_r1.rewards.exact import same_number, same_text
from tests.support.answer_forms import FORMS, draw_pairs

GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k" / "test.jsonl"


def test_no_wrong_answer_is_accepted_and_one_right_answer_of_a_hundred_refused(verifier):
    pairs = draw_pairs(seed=1, draws=6)
    assert len(FORMS) >= 40 and len(pairs) > 2000
    verdicts = verifier.verdicts([answer for _, _, answer, _ in pairs], [truth for _, truth, _, _ in pairs])
    wrong = [pair for pair, verdict in zip(pairs, verdicts, strict=True) if verdict is not pair[3]]
    assert not [pair for pair in wrong if not pair[3]], "wrong answers that were accepted"
    assert len(wrong) <= 0.01 * sum(right for *_, right in pairs), Counter(form for form, *_ in wrong)
    assert verifier.pool.killed == 0


@pytest.mark.parametrize(
    ("truth", "right", "wrong"),
    [
        # Equality is relative to size, and exact between rational numbers.
        ("10^{-20}", ["10^{-20}", "1e-20"], ["10^{-30}", "0"]),
        ("6.63 \\times 10^{-34}", ["6.63 \\cdot 10^{-34}", "6.63e-34"], ["1.05 \\times 10^{-34}", "0"]),
        ("\\frac{1}{2004!}", ["1/2004!"], ["\\frac{1}{2006!}"]),
        ("\\frac{2^{2005}+1}{3 \\cdot 2^{2006}}", [], ["\\frac{1}{3 \\cdot 2^{2006}}", "\\frac{1}{6}"]),
        ("1/3", ["\\frac{2}{6}", "0.\\overline{3}"], ["0.333333", "0.3333333333"]),
        ("\\sqrt{2} \\cdot 10^{-12}", ["1.414214 \\cdot 10^{-12}"], ["1.4142 \\cdot 10^{-12}", "10^{-12}"]),
        ("\\sqrt{2} \\cdot 10^{12}", ["1.414214 \\cdot 10^{12}"], ["1.4143 \\cdot 10^{12}"]),
        ("\\{10^{-9}, 1\\}", ["\\{1, 10^{-9}\\}"], ["\\{1, 10^{-10}\\}", "\\{0, 1\\}"]),
        ("\\begin{pmatrix} 10^{-9} \\\\ 1 \\end{pmatrix}", [], ["\\begin{pmatrix} 10^{-8} \\\\ 1 \\end{pmatrix}"]),
        ("\\infty", ["\u221e", "infinity"], ["5", "-\\infty", "\\sqrt{2}"]),
        ("\\sqrt{51}", [], ["\\infty"]),
        # Nothing is cut out of something larger.
        ("2", ["2"], ["2t", "2 + x", "2, 3", "2 < x", "x^2", "2:30", "(2, 2)", "5 = 2", "2^2"]),
        ("(1, -8)", ["(1,-8)"], ["(1,-7)", "(3,-15)", "[1,-8]", "\\{1,-8\\}"]),
        ("(3, 1)", ["(3,1)"], ["\\emptyset", "\\mathbb{R}", "(1, 3)", "\\varnothing"]),
        ("\\pm 2021", ["2021, -2021"], ["2021", "-2021"]),
        ("1331, 1728", ["1728 and 1331"], ["1728", "1331, 1728, 0"]),
        ("x + y = 5", ["y + x = 5"], ["5", "x - y = 5"]),
        ("5", ["x = 5", "f(2) = 5", "2 + 3 = 5", "\\text{the total} = 5"], ["x + y = 5", "2 + 2 = 5", "x = 6"]),
        # What is not written in the same way.
        ("sqrt(3)/2", ["\\frac{\\sqrt{3}}{2}", "sqrt(3) / 2"], ["sqrt(3/2)"]),
        ("x^{(1+2)*3}", ["x^((1+2)*3)", "x**9", "x^9"], ["x^3", "x^(1+2)*4"]),
        ("3\\sqrt{2} \\text{ cm}", ["3*sqrt(2) cm", "3\\sqrt{2}"], ["3\\sqrt{2} \\text{ m}", "3 cm"]),
        ("no", ["No", "**no**", "\\text{No.}"], ["on", "yes", "no way"]),
        ("5 million", ["5,000,000", "5 million"], ["5"]),
        ("$1,234.50", ["1234.5", "\\$1234.50", "1,234.50 dollars"], ["1234", "\u20ac1234.50", "1234.50 kg"]),
        ("5\u5143", ["5 \u5143", "5", "\uff15\u5143"], ["6\u5143", "5\u4e07\u5143"]),
    ],
)
def test_forms_that_are_easily_mistaken(verifier, truth, right, wrong):
    answers = [truth, *right, *wrong]
    expected = [True] * (1 + len(right)) + [False] * len(wrong)
    verdicts = verifier.verdicts(answers, [truth] * len(answers))
    assert dict(zip(answers, verdicts, strict=True)) == dict(zip(answers, expected, strict=True))


@pytest.mark.parametrize(
    ("truth", "right", "wrong"),
    [
        ("1e-07", ["0.0000001", "10^{-7}", "1 \u00d7 10^-7"], ["0", "1e-8"]),
        (
            "72",
            ["72 clips", "**72**", "$72", "72.0", "\\boxed{72}", "7\u200b2", "\uff17\uff12"],
            ["72 or 73", "7 2", "720"],
        ),
        ("1.5", ["1 1/2", "1\u00bd", "3/2", "\\frac{3}{2}", "150%"], ["1/2", "15", "15%"]),
        ("-5", ["\u22125", "\u20135", " -5."], ["5", "--5", "\\frac{5}{1}"]),
        ("50%", ["50%", "50", "0.5", "50 percent"], ["5000%", "0.05"]),
    ],
)
def test_plain_numbers_have_the_same_forms(truth, right, wrong):
    assert [answer for answer in right if not same_number(answer, truth)] == []
    assert [answer for answer in wrong if same_number(answer, truth)] == []


def test_text_is_compared_without_markup():
    assert (
        same_text("**Paris**", "Paris") and same_text("\u201cParis\u201d", "Paris") and not same_text("paris", "Paris")
    )


@pytest.mark.skipif(not GSM8K.is_file(), reason=f"GSM8K is not there: {GSM8K}")
@pytest.mark.parametrize("verifier_name", ["number", "math"])
def test_gsm8k_solutions_in_four_variants(verifier_name):
    """The published solution, its answer boxed or tagged with a unit, and another answer: every verdict is right."""
    rows = [json.loads(line)["answer"] for line in GSM8K.read_text(encoding="utf-8").splitlines()]
    answers = [row.rpartition("####")[2].strip() for row in rows]
    others = [f"{int(answer.replace(',', '')) + 1:,}" for answer in answers]
    responses = (
        rows
        + [
            f"<think>{row}</think> so \\boxed{{{answer} \\text{{ units}}}}"
            for row, answer in zip(rows, answers, strict=True)
        ]
        + [f"<think>{row}</think> <answer>**${answer}**</answer>" for row, answer in zip(rows, answers, strict=True)]
        + [f"{row.partition('####')[0]}#### {other}" for row, other in zip(rows, others, strict=True)]
    )
    prompts = [Prompt(str(index), "?", answer, "", "file") for index, answer in enumerate(answers)] * 4
    accuracy = Accuracy(RewardConfig(verifier=verifier_name, answer_format="any"))
    values = accuracy.score(prompts, responses)
    accuracy.close()
    assert len(values) == 4 * 1319 == 5276
    assert values == [1.0] * 3957 + [0.0] * 1319
