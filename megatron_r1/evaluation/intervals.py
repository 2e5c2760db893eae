"""Confidence intervals of measured shares and means; 95 % by default.

Every interval contains its mean. One of a share lies within [0, 1] and has a width above 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 4000
"""Resamples of a bootstrap: the bounds of 95 % are those of the 100 outermost on either side."""
RESAMPLED_AT_ONCE = 1 << 22
"""Weights of prompts in memory at a time."""
Z_95 = 1.959963984540054
"""Two-sided 95 % quantile of the standard normal distribution."""


class Interval(NamedTuple):
    """A share, or another mean, with its lower and upper bound."""

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


def bootstrap(prompt_values: Sequence[Sequence[float]], seed: int = 0) -> list[Interval]:
    """Mean over prompts of several measures, with 95 % percentile intervals of a bootstrap (Efron 1979).

    Prompts are drawn with replacement, each with all its responses, because responses to one prompt are correlated. All
    measures share the draws. Where every prompt has the same value a bootstrap has no width; then Wilson's interval
    over the prompts is given for a value in [0, 1].

    Args:
        prompt_values: value of each measure by prompt: as many rows as measures.

    Raises:
        ValueError: no prompt.
    """
    values_PM = np.asarray(prompt_values, dtype=np.float64).T
    count, means = len(values_PM), []
    if not values_PM.size:
        raise ValueError("a bootstrap needs at least one prompt and one measure")
    draws, at_once = np.random.default_rng(seed), max(1, RESAMPLED_AT_ONCE // count)
    for start in range(0, RESAMPLES, at_once):
        resamples = min(at_once, RESAMPLES - start)
        drawn_RP = draws.integers(count, size=(resamples, count)) + count * np.arange(resamples)[:, None]
        weights_RP = np.bincount(drawn_RP.ravel(), minlength=resamples * count).reshape(resamples, count)
        means.append(weights_RP @ values_PM / count)
    low_M, high_M = np.quantile(np.concatenate(means), (0.025, 0.975), axis=0)
    return [_interval(values_PM[:, index], low_M[index], high_M[index]) for index in range(values_PM.shape[1])]


def _interval(values_P: np.ndarray, low: float, high: float) -> Interval:
    mean = math.fsum(values_P) / len(values_P)
    if values_P.min() == values_P.max():
        value = float(values_P[0])
        return wilson(value * len(values_P), len(values_P)) if 0 <= value <= 1 else Interval(value, value, value)
    return Interval(mean, min(float(low), mean), max(float(high), mean))
