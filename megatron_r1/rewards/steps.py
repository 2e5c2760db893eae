"""Rewards of single steps of a response, for process supervision (DeepSeekMath, section 4.1.3).

The steps of arithmetic are its equations, of one operation each: one counts where it follows from what the question,
and the right steps before it, leave to be computed. So repeating one, or writing true equations beside the point, earns
nothing.
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
    """A step and what it is worth."""

    end: int
    """Characters of the response up to the end of the step."""
    value: float


StepRewards = Callable[[Sequence[RewardPrompt], Sequence[str]], list[list[RewardedStep]]]
"""Prompts and response texts -> the steps of each response, from the first to the last; may be called by threads."""


def arithmetic_steps(prompts: Sequence[RewardPrompt], texts: Sequence[str]) -> list[list[RewardedStep]]:
    """1 for each equation of the reasoning that follows from the question, else 0.

    A response without reasoning in its tags, or to a question without an expression, has no steps.
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
    """What is left of an expression while it is worked out, one operation at a time."""

    def __init__(self, numbers: list[int], operators: list[str]):
        self._numbers, self._operators = numbers, operators

    @classmethod
    def of(cls, expression: str) -> Remaining:
        """Of a text such as `2 + 3 * 4`."""
        return cls([int(n) for n in re.findall(r"[0-9]+", expression)], re.findall(r"[-+*]", expression))

    def take(self, left: int, operator: str, right: int, result: int) -> bool:
        """Whether the equation is true and is an operation that may be done now; if so, it is done."""
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
        """Whether doing this operation before the others leaves the value of the whole as it is.

        A product always may; a sum or difference where no product claims its numbers and no minus stands before it.
        """
        before = self._operators[index - 1] if index else "+"
        after = self._operators[index + 1] if index + 1 < len(self._operators) else "+"
        if self._operators[index] == "*":
            return True
        return before == "+" and after != "*"
