"""Rewards of single steps of a response, for process supervision (DeepSeekMath, section 4.1.3).

The steps of arithmetic reasoning are equations of one operation each. An equation is rewarded if it is the next valid
operation on the question's expression after the correct equations before it. So a repeated or irrelevant true equation
gets no reward.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from megatron_r1.rewards.extract import first_thought
from megatron_r1.rewards.reward import RewardPrompt

OPERATORS: dict[str, Callable[[int, int], int]] = {
    "+": lambda left, right: left + right,
    "-": lambda left, right: left - right,
    "*": lambda left, right: left * right,
}
EXPRESSION = re.compile(r"[0-9]{1,9}(?: ?[-+*] ?[0-9]{1,9}){1,20}")
EQUATION = re.compile(r"(-?[0-9]{1,9}) ?([-+*]) ?(-?[0-9]{1,9}) ?= ?(-?[0-9]{1,18})")


class RewardedStep(NamedTuple):
    """A reasoning step and its reward."""

    end: int
    """Characters of the response up to the end of the step."""
    value: float


StepRewards = Callable[[Sequence[RewardPrompt], Sequence[str]], list[list[RewardedStep]]]
"""Prompts and response texts -> the steps of each response, from the first to the last; may be called by threads."""


def arithmetic_steps(prompts: Sequence[RewardPrompt], texts: Sequence[str]) -> list[list[RewardedStep]]:
    """For each equation of the reasoning 1 if it follows from the question, else 0.

    A response without think tags, or to a question without an expression, has no steps.
    """
    return [steps_of(prompt.question, text) for prompt, text in zip(prompts, texts, strict=True)]


def steps_of(question: str, response: str) -> list[RewardedStep]:
    """The equations of one response."""
    expression, thought = EXPRESSION.search(question), first_thought(response)
    if not (expression and thought):
        return []
    remaining = Remaining.of(expression.group())
    return [
        RewardedStep(step.end(), float(remaining.take(int(step[1]), step[2], int(step[3]), int(step[4]))))
        for step in EQUATION.finditer(response, *thought)
    ]


class Remaining:
    """The rest of an expression that is evaluated one operation at a time."""

    def __init__(self, numbers: list[int], operators: list[str]):
        self._numbers, self._operators = numbers, operators

    @classmethod
    def of(cls, expression: str) -> Remaining:
        """Parses a text such as `2 + 3 * 4`."""
        return cls([int(n) for n in re.findall(r"[0-9]+", expression)], re.findall(r"[-+*]", expression))

    def take(self, left: int, operator: str, right: int, result: int) -> bool:
        """Apply an equation; False, without effect, where it is wrong or is no operation that may come next."""
        if OPERATORS[operator](left, right) != result:
            return False
        pairs = {(left, right), (right, left)} if operator in "+*" else {(left, right)}
        for index, found in enumerate(self._operators):
            here = (self._numbers[index], self._numbers[index + 1])
            if found == operator and here in pairs and self._may_come_first(index):
                self._numbers[index : index + 2] = [result]
                del self._operators[index]
                return True
        return False

    def _may_come_first(self, index: int) -> bool:
        """Whether the value of the whole stays the same if this operation is evaluated before the others.

        True for every product; for a sum or difference where no product uses its numbers and no minus precedes it.
        """
        before = self._operators[index - 1] if index else "+"
        after = self._operators[index + 1] if index + 1 < len(self._operators) else "+"
        if self._operators[index] == "*":
            return True
        return before == "+" and after != "*"
