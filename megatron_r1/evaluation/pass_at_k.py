"""pass@k and cons@k of several responses to one prompt, as expected values over all subsets of k of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np


def sizes_up_to(samples: int) -> list[int]:
    """The k that are reported: 1, 2, 4 and so on, and the number of samples."""
    return sorted({*(1 << power for power in range(samples.bit_length())), samples})


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Probability that at least one of k responses is correct, k drawn from `samples` without replacement.

    The unbiased estimate 1 - C(n - c, k) / C(n, k) of Chen et al. 2021 (arXiv 2107.03374, equation 1), as a product of
    factors between 0 and 1, which neither overflows nor cancels.

    Raises:
        ValueError: k or `correct` is out of range.
    """
    if not (1 <= k <= samples and 0 <= correct <= samples):
        raise ValueError(f"samples={samples}, correct={correct}, k={k}: need 1 <= k and both at most samples")
    if samples - correct < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / count for count in range(samples - correct + 1, samples + 1))


def cons_at_k(correct: int, wrong: Sequence[int], abstained: int, k: int) -> float:
    """Probability that the majority of k responses votes for the true answer, k drawn without replacement.

    An answer that gets as many votes as others wins with equal probability; without any vote nothing wins. If every
    response is drawn with probability k / n on its own, all sets of k of them are equally likely, so the value is the
    probability to win with k drawn over that to draw k. Every factor lies between 0 and 1, so nothing overflows.

    Args:
        correct: votes for the true answer.
        wrong: votes for each other answer.
        abstained: responses without an answer.

    Raises:
        ValueError: k is out of range.
    """
    samples = correct + sum(wrong) + abstained
    if not 1 <= k <= samples:
        raise ValueError(f"k={k}: must lie between 1 and the {samples} samples")
    share, won = k / samples, 0.0
    for votes in range(1, min(correct, k) + 1):
        harmless = abstained + sum(count for count in wrong if count < votes)
        drawn_KR = np.zeros((k + 1, k // votes + 1))  # [responses drawn, rivals with as many votes]
        drawn_KR[votes:, 0] = _drawn(correct, share, k)[votes] * _drawn(harmless, share, k)[: k + 1 - votes]
        for count in wrong:
            if count >= votes:
                drawn_KR = _with_rival(drawn_KR, _drawn(count, share, k)[: votes + 1])
        won += float(drawn_KR[k] @ (1.0 / np.arange(1, drawn_KR.shape[1] + 1)))
    return won / float(_drawn(samples, share, k)[k])


def _with_rival(drawn_KR: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """One more answer, which may get as many votes as the true one and no more."""
    result_KR, most = np.zeros_like(drawn_KR), len(probabilities) - 1
    for votes, probability in enumerate(probabilities[:most]):
        result_KR[votes:] += probability * drawn_KR[: len(drawn_KR) - votes]
    result_KR[most:, 1:] += probabilities[most] * drawn_KR[: len(drawn_KR) - most, :-1]
    return result_KR


@lru_cache(4096)
def _drawn(count: int, share: float, k: int) -> np.ndarray:
    """[k + 1]: probability that exactly so many of `count` responses are drawn."""
    probabilities = np.zeros(max(count, k) + 1)
    probabilities[0] = 1.0
    for _ in range(count):
        probabilities[1:] = probabilities[1:] * (1.0 - share) + probabilities[:-1] * share
        probabilities[0] *= 1.0 - share
    return probabilities[: k + 1]
