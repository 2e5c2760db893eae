"""What a response is worth: the weighted sum of its rewards, with what each adds."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_r1.config.reward import RewardConfig
from megatron_r1.rewards.accuracy import accuracy
from megatron_r1.rewards.format import format_reward
from megatron_r1.rewards.reward import Reward, RewardPrompt, Unscored, Value
from megatron_r1.rewards.steps import RewardedStep, StepRewards

FIRST_PAUSE_S = 0.5
"""Before an answer that could not be judged is tried again; each further pause is twice as long."""


@dataclass(frozen=True, slots=True)
class Score:
    """A reward and what it is made of."""

    total: float
    """Sum of the weighted parts."""
    parts: dict[str, float]
    """Reward name -> its weighted value: what it adds to the total."""
    steps: tuple[RewardedStep, ...] = ()
    """Weighted rewards of the response's steps, which are not in the total."""


@dataclass(frozen=True, slots=True)
class Weighted:
    """A reward and what it counts."""

    weight: float
    reward: Reward


@dataclass(frozen=True, slots=True)
class WeightedSteps:
    """What rewards steps, and how much they count."""

    weight: float
    rewards: StepRewards


class Rubric:
    """Rewards with their weights; may be asked by many threads."""

    def __init__(self, parts: Sequence[Weighted], retries: int = 0, steps: WeightedSteps | None = None):
        """
        Args:
            parts: what is added up; two rewards of one name are one entry of the breakdown.
            retries: further tries of answers that could not be judged.
            steps: what rewards single steps, if anything does.
        """
        self.parts, self._retries, self._steps = tuple(parts), retries, steps

    def __call__(self, prompts: Sequence[RewardPrompt], texts: Sequence[str]) -> list[Score | Unscored]:
        """The score of each response text, in order; Unscored where a reward could not judge it after all tries."""
        found: list[Score | Unscored] = [Score(0.0, {}) for _ in texts]
        for part in self.parts:
            for place, value in enumerate(self._tried(part.reward, prompts, texts)):
                before = found[place]
                if isinstance(before, Unscored):
                    continue
                if isinstance(value, Unscored):
                    found[place] = value
                    continue
                name, worth = part.reward.name, part.weight * value
                parts = {**before.parts, name: before.parts.get(name, 0.0) + worth}
                found[place] = Score(sum(parts.values()), parts)
        return self._with_steps(found, prompts, texts) if self._steps else found

    def _with_steps(
        self, found: Sequence[Score | Unscored], prompts: Sequence[RewardPrompt], texts: Sequence[str]
    ) -> list[Score | Unscored]:
        assert self._steps
        weight = self._steps.weight
        return [
            score
            if isinstance(score, Unscored)
            else replace(score, steps=tuple(RewardedStep(step.end, weight * step.value) for step in steps))
            for score, steps in zip(found, self._steps.rewards(prompts, texts), strict=True)
        ]

    def _tried(self, reward: Reward, prompts: Sequence[RewardPrompt], texts: Sequence[str]) -> list[Value]:
        values = reward.score(prompts, texts)
        for number in range(self._retries):
            missing = [place for place, value in enumerate(values) if isinstance(value, Unscored)]
            if not missing:
                break
            time.sleep(FIRST_PAUSE_S * 2**number)
            again = reward.score([prompts[place] for place in missing], [texts[place] for place in missing])
            for place, value in zip(missing, again, strict=True):
                values[place] = value
        return values


def weighted(right: bool, response: str, config: RewardConfig) -> Score:
    """The score by accuracy and format of a response whose answer has been judged."""
    parts = {
        "accuracy": config.accuracy * float(right),
        "format": config.format * format_reward(response, config.format_style),
    }
    return Score(sum(parts.values()), parts)


def score(response: str, truth: str, config: RewardConfig) -> Score:
    """Score a response, the text after the prompt, by accuracy and format against a true number."""
    return weighted(accuracy(response, truth) > 0, response, config)
