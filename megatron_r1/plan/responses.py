"""The responses of a rollout: how long they are, and how many micro-batches they fill."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import ceil, exp, log
from statistics import NormalDist

from megatron_r1.plan.serving import NEXT_FIT, NO_PACKING
from megatron_r1.train.batching import micro_batches_by_tokens

SPREAD = 0.7
"""Standard deviation of the logarithm of a response's length: lengths of reasoning models are about log-normal. An
assumption: no published step says it."""
SAMPLES = 256
"""Responses by which micro-batches are counted."""


@dataclass(frozen=True, slots=True)
class Responses:
    """The responses of a rollout: lengths are log-normal and cut off at the longest."""

    number: int
    mean: float
    """Tokens of a response, as it is cut off."""
    longest: int
    """Tokens after which a response is cut off."""
    prompt: float
    """Mean tokens of a prompt."""

    @property
    def tokens(self) -> float:
        """Of all responses with their prompts."""
        return self.number * (self.prompt + self.mean)

    def length_at(self, share: float) -> float:
        """The length that this share of the responses does not exceed, in tokens."""
        if share <= 0:
            return 0.0
        return min(self.longest, _median(self.mean, self.longest) * exp(SPREAD * NormalDist().inv_cdf(share)))

    def micro_batches(self, budget: int, packing: str = NEXT_FIT) -> float:
        """Micro-batches of at most `budget` tokens that the responses fill with their prompts."""
        if packing == NO_PACKING:
            return self.number
        return self.number * _filled(self, budget, packing) / SAMPLES


@cache
def _median(mean: float, longest: float) -> float:
    """Median of the log-normal that has this mean when it is cut off at the longest."""
    normal = NormalDist()

    def cut_off_mean(median: float) -> float:
        above = log(longest / median) / SPREAD
        return median * exp(SPREAD**2 / 2) * normal.cdf(above - SPREAD) + longest * (1 - normal.cdf(above))

    low, high = 1e-3, 1e3 * longest
    for _ in range(80):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if cut_off_mean(middle) < mean else (low, middle)
    return low


@cache
def _filled(responses: Responses, budget: int, packing: str) -> int:
    lengths = [ceil(responses.prompt + responses.length_at((index + 0.5) / SAMPLES)) for index in range(SAMPLES)]
    if packing == NEXT_FIT:
        return len(micro_batches_by_tokens(lengths, budget))
    rooms: list[int] = []
    for length in reversed(lengths):
        index = next((index for index, room in enumerate(rooms) if room >= length), None)
        if index is None:
            rooms.append(budget - length)
        else:
            rooms[index] -= length
    return len(rooms)
