"""Which equations of a reasoning follow from the question: the world's own, and any against Python's value."""

from __future__ import annotations

import random

import pytest

from megatron_r1.config.data import DataConfig
from megatron_r1.data.synthetic.arithmetic import draw_problem, worked_documents, write_response
from megatron_r1.data.synthetic.expressions import careful_steps, hasty_steps
from megatron_r1.rewards.steps import EQUATION, Remaining, steps_of

CONFIG = DataConfig(num_documents=2000)


def values(question: str, thought: str) -> list[float]:
    return [step.value for step in steps_of(question, f"<think>{thought}</think> <answer>0</answer>")]


def test_careful_steps_are_right_in_both_languages_and_end_with_their_results():
    rng = random.Random(0)
    for _ in range(500):
        problem = draw_problem(rng, CONFIG)
        text, _ = write_response(problem, "careful", "think", rng.choice(["en", "zh"]), rng)
        steps = steps_of(problem.question, text)
        assert [step.value for step in steps] == [1.0, 1.0], text
        for step, (left, operator, right, result) in zip(steps, careful_steps(problem.expression), strict=True):
            assert text[: step.end].endswith(f"{left} {operator} {right} = {result}")


def test_hasty_steps_are_wrong_where_precedence_matters():
    written = worked_documents(DataConfig(num_documents=8000))
    hasty = [d for d in written if (d.quality, d.style, d.kind) == ("hasty", "think", "answer")]
    wrong = [d for d in hasty if hasty_steps(d.expression) != careful_steps(d.expression)]
    assert len(wrong) > 50
    seconds = []
    for document in wrong:
        first, second = (step.value for step in steps_of(document.expression, document.response))
        assert first == 0.0
        seconds.append(second)
    # The second may be what should have come first, as 1 * 5 = 5 after 0 + 1 = 1 in 0 + 1 * 5.
    assert sum(seconds) < 0.1 * len(seconds)


@pytest.mark.parametrize(
    ("question", "thought", "expected"),
    [
        ("What is 2 + 3 * 4?", "3 * 4 = 12, 2 + 12 = 14", [1, 1]),
        ("What is 2 + 3 * 4?", "4 * 3 = 12, 12 + 2 = 14", [1, 1]),  # sums and products may be turned round
        ("What is 2 + 3 * 4?", "3*4=12, 3 * 4 = 12, 2+12=14, 2 + 12 = 14", [1, 0, 1, 0]),  # once is enough
        ("What is 2 + 3 * 4?", "1 + 1 = 2, 2 + 12 = 14, 3 * 4 = 12", [0, 0, 1]),  # beside the point, and too early
        ("What is 2 + 3 * 4?", "3 * 4 = 13, 2 + 13 = 15, 3 * 4 = 12", [0, 0, 1]),
        ("9 - 5 + 3 =", "5 + 3 = 8, 9 - 8 = 1", [0, 0]),
        ("9 - 5 + 3 =", "9 - 5 = 4, 4 + 3 = 7", [1, 1]),
        ("9 - 5 - 3 =", "5 - 9 = -4, 5 - 3 = 2", [0, 0]),
        ("2 - 9 + 3 =", "2 - 9 = -7, -7 + 3 = -4", [1, 1]),
        ("9 - 2 * 3 * 1", "2 * 3 = 6, 3 * 1 = 3, 6 * 1 = 6, 9 - 6 = 3", [1, 0, 1, 1]),
        ("计算1 + 2 * 3。", "先算2 * 3 = 6，再算1 + 6 = 7", [1, 1]),
        ("Who are you?", "1 + 1 = 2", []),
        ("What is 1 + 1?", "it is two", []),
    ],
)
def test_an_equation_counts_once_and_when_its_turn_has_come(question, thought, expected):
    assert values(question, thought) == expected


def test_only_reasoning_in_its_tags_is_read_though_they_need_not_be_closed():
    assert steps_of("1 + 2", "1 + 2 = 3 <answer>3</answer>") == []
    assert [s.value for s in steps_of("1 + 2", "<think>1 + 2 = 3")] == [1.0]
    assert steps_of("1 + 2", "<think></think> 1 + 2 = 3") == []


def test_accepted_equations_leave_the_value_unchanged_and_no_others_do():
    """Against Python's own value, for every operation that could be tried at every moment."""
    rng = random.Random(1)
    for _ in range(200):
        operators = [rng.choice("+-*") for _ in range(rng.randint(1, 5))]
        numbers = rng.sample(range(100, 1000), len(operators) + 1)  # large, so that no two values are equal by chance
        whole = eval(spelt(numbers, operators))
        while operators:
            allowed = []
            for index, operator in enumerate(operators):
                result = eval(f"({numbers[index]}) {operator} ({numbers[index + 1]})")
                left = [*numbers[:index], result, *numbers[index + 2 :]], operators[:index] + operators[index + 1 :]
                accepted = Remaining([*numbers], [*operators]).take(
                    numbers[index], operator, numbers[index + 1], result
                )
                assert accepted == (eval(spelt(*left)) == whole), (numbers, operators, index)
                allowed += [left] if accepted else []
            numbers, operators = rng.choice(allowed)
        assert numbers == [whole]


def spelt(numbers: list[int], operators: list[str]) -> str:
    return " ".join(f"({n}) {o}" for n, o in zip(numbers, [*operators, ""], strict=True))


def test_hostile_text_costs_nothing():
    for text in ("1 + " * 20_000, "9" * 200_000, "<think>" * 30_000, "1 * 1 = 1 " * 20_000, "- " * 100_000):
        assert isinstance(steps_of("1 + 2 * 3", f"<think>{text}"), list)
    assert EQUATION.search("9" * 10_000) is None
