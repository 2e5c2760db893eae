"""Mathematical verifier: whether an answer equals the true answer as an expression, in any form.

Two plain numbers are compared exactly in this process, as `exact.same_number` does. A number may have a unit (`14 cm`,
`$14`, `14 apples`), which counts as wrong only where the true answer has another unit. All else goes to math-verify in
a worker process. An answer that exceeds the deadline or kills the worker is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from megatron_r1.config.reward import MathConfig
from megatron_r1.rewards.exact import parse_number
from megatron_r1.rewards.reward import Unscored
from megatron_r1.rewards.workers import WorkerPool, WorkersDown

WRAPPED = (("\\boxed{", "}"), ("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"))
TEXT = re.compile(r"\\(?:text|mathrm|textbf|mathbf)\{([^{}\\]*)\}|\\[,;! ]|~")
CURRENCY = re.compile(r"(?:\\?\$|[\u20ac\u00a3\u00a5])\s*")
QUANTITY = re.compile(r"([-+]?[0-9][0-9,]*(?:\.[0-9]+)?(?:/[0-9]+)?) *([^\W\d_][^\W\d_.]*(?: [^\W\d_.]+){0,2}\.?|\\?%)")
NO_UNITS = re.compile(
    r"\b(?:or|and|not|to|by|is|are|if|than|times|plus|minus|true|false|e|i|x|y|z|n|pi|sqrt)\b", re.IGNORECASE
)
BRACES = re.compile(r"\\.|[{}]", re.DOTALL)


def unwrapped(text: str) -> str:
    """The text without a box or dollar signs around all of it."""
    text = text.strip()
    for before, after in WRAPPED:
        inner = text[len(before) : -len(after)]
        wraps = len(text) > len(before) + len(after) and text.startswith(before) and text.endswith(after)
        if wraps and balanced(inner) and "$" not in inner:
            return unwrapped(inner)
    return text


def balanced(text: str) -> bool:
    """Whether all braces are paired, so that the answer stays inside the expression into which it is inserted."""
    depth = 0
    for token in BRACES.findall(text):
        depth += (token == "{") - (token == "}")
        if depth < 0:
            return False
    return depth == 0


def quantity(text: str) -> tuple[str, str]:
    """A number and its unit; the whole text and an empty unit where the text is not a number with a unit."""
    plain = CURRENCY.sub("", TEXT.sub(lambda match: f" {match.group(1) or ''}", text)).strip()
    match = QUANTITY.fullmatch(plain)
    if match is None or NO_UNITS.search(match.group(2)):
        return plain, ""
    return match.group(1), match.group(2).strip(" .\\").casefold()


def at_once(answer: str, truth: str) -> bool | None:
    """Whether two numbers, with or without units, are equal; None where one text is no number."""
    (number, unit), (true_number, true_unit) = quantity(answer), quantity(truth)
    value, true_value = parse_number(number), parse_number(true_number)
    if value is None or true_value is None:
        return None
    return value == true_value and (not unit or not true_unit or unit == true_unit)


def contradicts_itself(answer: str) -> bool:
    """Whether the answer is an equation between different numbers."""
    values = {parse_number(part) for part in answer.split("=")} - {None}
    return len(values) > 1


def expression(text: str) -> list[Any]:
    """The whole text as one expression, in the forms that math-verify makes of it."""
    from math_verify import LatexExtractionConfig, parse

    config = LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)
    found: list[Any] = parse(f"\\boxed{{{text}}}", [config], parsing_timeout=None)
    return found


def equal_expressions(answer: str, truth: str) -> bool:
    """Whether math-verify finds them equal.

    A worker asks it, without its own time limits: they work in a main thread only, and some answers
    (`10^{10^{10^{10}}}`) would never come back.
    """
    from math_verify import verify

    return bool(verify(expression(truth), expression(answer), timeout_seconds=None))


class MathVerifier:
    """Verifies answers as mathematical expressions; its workers start with the first answer that needs them."""

    def __init__(self, config: MathConfig):
        self._config = config
        warm_up = partial(equal_expressions, "1", "1")  # math-verify compiles some of itself at first use
        self.pool = WorkerPool(equal_expressions, warm_up, config.workers, config.timeout_s)

    def is_correct(self, answer: str | None, truth: str) -> bool | Unscored:
        """Whether an answer is correct; Unscored when no worker is available."""
        if answer is None or len(answer) > self._config.max_characters:
            return False
        answer, truth = unwrapped(answer), unwrapped(truth)
        if (verdict := at_once(answer, truth)) is not None:
            return verdict
        if not answer or not balanced(answer) or "\\boxed" in answer or contradicts_itself(answer):
            return False
        try:
            return self.pool.ask(answer, truth)
        except WorkersDown as error:
            return Unscored(f"math workers: {error}")

    def verdicts(self, answers: Sequence[str | None], truths: Sequence[str]) -> list[bool | Unscored]:
        """Verdicts on many answers, in order; as many are verified at a time as there are workers."""
        with ThreadPoolExecutor(self._config.workers, "math") as threads:
            return list(threads.map(self.is_correct, answers, truths))

    def close(self) -> None:
        self.pool.close()
