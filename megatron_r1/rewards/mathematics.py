"""Mathematical verifier: whether an answer equals the true answer as an expression, in any form.

Numbers, words and times are compared in this process; all else goes to math-verify in a worker process (`expressions`).
An answer that exceeds the deadline or kills the worker is wrong.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from functools import partial

from megatron_r1.config.reward import MathConfig
from megatron_r1.rewards.exact import chosen_letter
from megatron_r1.rewards.expressions import equal_expressions
from megatron_r1.rewards.normalise import balanced, normalised
from megatron_r1.rewards.quantity import TEXT_COMMAND, Quantity, parse_quantity, same_quantity
from megatron_r1.rewards.reward import Unscored
from megatron_r1.rewards.workers import WorkerPool, WorkersDown

_WORD = re.compile(
    r"[^\W\d_]{3,}(?:[ '-]+[^\W\d_]+)*|yes|no|on|up|in|at|[^\W\d_]{2,}(?:[ '-]+[^\W\d_]{2,})+", re.IGNORECASE
)
_CHOICE = re.compile(r"\(?[A-Z]\)?")
_PARTS = re.compile(r"([0-9]+(?: ?: ?[0-9]+)+) ?([ap])?\.? ?m?\.?", re.IGNORECASE)


def at_once(answer: str, truth: str) -> bool | None:
    """The verdict on two normalised texts where no algebra is needed; None where it is."""
    quantity, true_quantity = parse_quantity(answer), parse_quantity(truth)
    if quantity and true_quantity:
        return same_quantity(quantity, true_quantity)
    plain, true_plain = (TEXT_COMMAND.sub(r"\1", text).strip(" .") for text in (answer, truth))
    if _CHOICE.fullmatch(true_plain) and chosen_letter(plain):
        return chosen_letter(plain) == chosen_letter(true_plain)
    if _WORD.fullmatch(true_plain):
        return plain.casefold().split() == true_plain.casefold().split()
    parts, true_parts = _PARTS.fullmatch(plain), _PARTS.fullmatch(true_plain)
    if parts and true_parts:
        return same_time_or_ratio(parts, true_parts)
    if (parts and true_quantity) or (true_parts and quantity):
        ratio, number = (parts, true_quantity) if parts and true_quantity else (true_parts, quantity)
        return bool(ratio and number) and as_ratio(ratio) == number  # type: ignore[arg-type]
    return None


def as_ratio(match: re.Match[str]) -> Quantity | None:
    """The value of a ratio of two numbers, such as 3:4; None for a time and for more numbers."""
    numbers = [int(number) for number in match[1].split(":")]
    is_time = match[2] or re.search(r":[0-9]{2}$", match[1])
    return None if is_time or len(numbers) != 2 or 0 in numbers else Quantity(Fraction(*numbers))


def same_time_or_ratio(parts: re.Match[str], true: re.Match[str]) -> bool:
    """Whether two times or ratios are equal: 5:30 pm and 5:30, 2:4 and 1:2."""
    numbers, true_numbers = ([int(number) for number in match[1].split(":")] for match in (parts, true))
    if parts[2] or true[2]:
        halves = {half.lower() for half in (parts[2], true[2]) if half}
        return numbers == true_numbers and len(halves) == 1
    if 0 in numbers + true_numbers:
        return numbers == true_numbers
    shares, true_shares = ([n // math.gcd(*each) for n in each] for each in (numbers, true_numbers))
    return shares == true_shares


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
        answer, truth = normalised(answer), normalised(truth)
        if (verdict := at_once(answer, truth)) is not None:
            return verdict
        if not answer or not balanced(answer) or "\\boxed" in answer:
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
