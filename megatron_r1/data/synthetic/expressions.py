"""The expressions of the arithmetic world: their form, their values, and which of them are held out.

An expression is three numbers from 0 to 9 with two operators from `+ - *`. Every step of its evaluation, and its
result, lies between 0 and 99. The *family* (`FORM_SHARES`) is what most questions are drawn from; the whole `world()`
is every expression of this kind, which is what the tasks of reasoning-gym are filtered to.

Two-number sums and products are the steps of a worked answer, never a question, so a step can not give away a held-out
expression.
"""

from __future__ import annotations

import hashlib
import re
from functools import cache
from itertools import product

LARGEST_RESULT = 99
FORM_SHARES = {"+*": 0.50, "*+": 0.20, "*-": 0.14, "-+": 0.08, "++": 0.08}
"""Operators of a family form (`+*` is a + b * c) -> its share of the family's questions."""

Step = tuple[int, str, int, int]
"""left, operator, right, result."""


def normalise(expression: str) -> str:
    """The one spelling of an expression: single spaces around operators, `*` for every multiplication sign."""
    plain = re.sub(r"\s+", "", expression).replace("\u00d7", "*").replace("\u2212", "-")
    return " ".join(re.findall(r"\d+|[^\d]", plain))


def in_eval_split(expression: str, fraction: float) -> bool:
    """Whether `expression` is held out for evaluation, so that no training text or prompt may contain it.

    A hash of the normalised expression decides, so the split is the same for every seed and every task that could
    produce the expression; raising `fraction` only adds to the held-out side.
    """
    digest = hashlib.sha256(normalise(expression).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < fraction


def apply(left: int, operator: str, right: int) -> int:
    """`left operator right` for an operator of `+ - *`."""
    return {"+": left + right, "-": left - right, "*": left * right}[operator]


def split_expression(expression: str) -> tuple[list[int], list[str]]:
    """Numbers and operators of a normalised expression."""
    parts = expression.split(" ")
    return [int(number) for number in parts[0::2]], parts[1::2]


def evaluate_in_order(expression: str, first: int) -> list[Step]:
    """The two steps of a three-number expression that is evaluated from operator `first` (0 or 1)."""
    numbers, operators = split_expression(expression)
    inner = apply(numbers[first], operators[first], numbers[first + 1])
    one: Step = (numbers[first], operators[first], numbers[first + 1], inner)
    left, right = (inner, numbers[2]) if first == 0 else (numbers[0], inner)
    other = operators[1 - first]
    return [one, (left, other, right, apply(left, other, right))]


def first_operator(expression: str) -> int:
    """Index of the operator that is evaluated first: a multiplication before a sum, otherwise left to right."""
    _, operators = split_expression(expression)
    return 1 if operators[1] == "*" and operators[0] != "*" else 0


def careful_steps(expression: str) -> list[Step]:
    """The evaluation that honours precedence; its last result is the true value."""
    return evaluate_in_order(expression, first_operator(expression))


def hasty_steps(expression: str) -> list[Step]:
    """The evaluation that takes the operations in the wrong order.

    Left to right where a multiplication should come first, and the sum first where the multiplication stands first.
    Where that would go below zero, or where there is nothing to get wrong, it is the careful evaluation.
    """
    _, operators = split_expression(expression)
    if operators.count("*") != 1:
        return careful_steps(expression)
    steps = evaluate_in_order(expression, 1 - first_operator(expression))
    return steps if min(result for *_, result in steps) >= 0 else careful_steps(expression)


def value(expression: str) -> int:
    """The value of a normalised expression."""
    return careful_steps(expression)[-1][-1]


def _expressions(operators: str) -> list[str]:
    """Every expression with these two operators whose steps all lie in 0..99, in a fixed order."""
    found = []
    for a, b, c in product(range(10), repeat=3):
        expression = f"{a} {operators[0]} {b} {operators[1]} {c}"
        if all(0 <= result <= LARGEST_RESULT for *_, result in careful_steps(expression)):
            found.append(expression)
    return found


@cache
def family() -> dict[str, tuple[str, ...]]:
    """Operators of each family form -> its expressions (about 4,400 in all)."""
    return {operators: tuple(_expressions(operators)) for operators in FORM_SHARES}


@cache
def world() -> frozenset[str]:
    """Every expression that a question may ask for, those of the family included."""
    return frozenset(e for pair in product("+-*", repeat=2) for e in _expressions("".join(pair)))


@cache
def training_expressions(operators: str, eval_fraction: float) -> tuple[str, ...]:
    """The expressions of one form that are not held out."""
    return tuple(e for e in _expressions(operators) if not in_eval_split(e, eval_fraction))


@cache
def eval_expressions(eval_fraction: float) -> tuple[str, ...]:
    """The held-out expressions of the family, in the order of their hashes: any prefix is a fair sample."""
    kept = [e for form in family().values() for e in form if in_eval_split(e, eval_fraction)]
    return tuple(sorted(kept, key=lambda e: hashlib.sha256(e.encode()).hexdigest()[::-1]))
