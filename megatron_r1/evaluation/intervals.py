"""Confidence intervals of measured shares; 95 % by default.

Every interval lies within [0, 1], contains its mean and has a width above 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

Z_95 = 1.959963984540054
"""Two-sided 95 % quantile of the standard normal distribution."""


class Interval(NamedTuple):
    """A share with its lower and upper bound."""

    mean: float
    low: float
    high: float

    def disjoint(self, other: Interval) -> bool:
        """Whether the two intervals do not overlap."""
        return self.high < other.low or other.high < self.low


def wilson(successes: float, total: int, z: float = Z_95) -> Interval:
    """Wilson's score interval of a share of independent trials (Wilson 1927).

    Raises:
        ValueError: no trial, or successes outside [0, total].
    """
    if total < 1 or not 0 <= successes <= total:
        raise ValueError(f"successes={successes}, total={total}: need 0 <= successes <= total and at least one trial")
    share = successes / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return Interval(share, min(max(centre - half, 0.0), share), max(min(centre + half, 1.0), share))


def clustered(prompt_means: Sequence[float], z: float = Z_95) -> Interval:
    """Mean over prompts of each prompt's share of correct responses.

    Responses to one prompt are correlated, so prompts, not responses, are counted as independent: the standard error is
    that of the prompt means. Where all means are equal it would be 0; then Wilson's interval over the prompts is given.

    Raises:
        ValueError: no prompt, or a share outside [0, 1].
    """
    count = len(prompt_means)
    if count < 1 or not all(0 <= value <= 1 for value in prompt_means):
        raise ValueError(f"{count} prompt means: need at least one, each between 0 and 1")
    mean = math.fsum(prompt_means) / count
    if min(prompt_means) == max(prompt_means):
        return wilson(prompt_means[0] * count, count, z)
    variance = math.fsum((value - mean) ** 2 for value in prompt_means) / (count - 1)
    half = z * math.sqrt(variance / count)
    return Interval(mean, max(mean - half, 0.0), min(mean + half, 1.0))
