"""What a response is worth: the weighted sum of its rule rewards."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_r1.config.reward import RewardConfig
from megatron_r1.rewards.accuracy import accuracy
from megatron_r1.rewards.format import format_reward


@dataclass(frozen=True, slots=True)
class Score:
    """A reward and what it is made of."""

    total: float
    """Sum of the weighted parts."""
    parts: dict[str, float]
    """Reward name -> its weighted value: what it adds to the total."""


def weighted(right: bool, response: str, config: RewardConfig) -> Score:
    """The score of a response whose answer has been judged."""
    parts = {
        "accuracy": config.accuracy * float(right),
        "format": config.format * format_reward(response, config.format_style),
    }
    return Score(sum(parts.values()), parts)


def score(response: str, truth: str, config: RewardConfig) -> Score:
    """Score a response, the text after the prompt, against the true answer."""
    return weighted(accuracy(response, truth) > 0, response, config)
