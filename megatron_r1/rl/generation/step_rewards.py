"""Steps of an answer's text, at the tokens that end them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import cache

from megatron_r1.rewards.steps import RewardedStep
from megatron_r1.rollout.sample import StepRewards

UNFINISHED = "\ufffd"
"""What a decoder writes for bytes that are no character yet."""


def steps_at_tokens(
    steps: Sequence[RewardedStep], tokens: Sequence[int], decode: Callable[[Sequence[int]], str]
) -> StepRewards:
    """The token with which each step is complete, and the step's reward.

    What was sampled need not be how the tokenizer would cut the text, so tokens are decoded rather than the text
    encoded: some log2(tokens) times for each step.

    Args:
        decode: tokens -> text; that of all `tokens` is the one whose steps these are.
    """

    @cache
    def told_by(count: int) -> int:
        """Characters of the text that the first `count` tokens make up, without one that is not yet whole."""
        return len(decode(tokens[:count]).rstrip(UNFINISHED))

    counts = range(1, len(tokens))
    return tuple((bisect_left(counts, step.end, key=told_by), step.value) for step in steps)
