"""The score of a response: the weighted sum of its rewards, and each reward's part of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from megatron_r1.rewards.reward import Reward, RewardPrompt, Unscored, Value
from megatron_r1.rewards.steps import RewardedStep, StepRewards

FIRST_PAUSE_S = 0.5
"""Seconds before the first retry of unscored responses; each further pause is twice as long."""


@dataclass(frozen=True, slots=True)
class Score:
    """The total reward of a response, and its parts."""

    total: float
    """Sum of the weighted parts."""
    parts: dict[str, float]
    """Reward name -> its weighted value, which the total sums up."""
    steps: tuple[RewardedStep, ...] = ()
    """Weighted rewards of the response's steps, which are not in the total."""


Scorer = Callable[[Sequence[RewardPrompt], Sequence[str]], list[Score | Unscored]]
"""Prompts and response texts -> scores; may be called by several threads. A `Rubric` is one."""


@dataclass(frozen=True, slots=True)
class TextRule:
    """A reward that is a pure function of the response text."""

    name: str
    function: Callable[[str], float]

    def score(self, prompts: Sequence[RewardPrompt], texts: Sequence[str]) -> list[Value]:
        return [self.function(text) for text in texts]


@dataclass(frozen=True, slots=True)
class Weighted:
    """A reward and its weight."""

    weight: float
    reward: Reward
    domain: str | None = None
    """Domain of the prompts whose responses it scores; None scores all."""

    def scored(self, prompts: Sequence[RewardPrompt]) -> list[int]:
        """Indices of the prompts whose responses it scores."""
        return [index for index, prompt in enumerate(prompts) if self.domain is None or self.domain == prompt.domain]


@dataclass(frozen=True, slots=True)
class WeightedSteps:
    """Rewards of steps, and their weight."""

    weight: float
    rewards: StepRewards


class Rubric:
    """Rewards with their weights; several threads may call it."""

    def __init__(self, parts: Sequence[Weighted], retries: int = 0, steps: WeightedSteps | None = None):
        """
        Args:
            parts: weighted rewards that the score sums up; two of the same name are one entry of the breakdown.
            retries: further attempts to score unscored responses.
            steps: rewards of reasoning steps; None for none.
        """
        self.parts, self._retries, self._steps = tuple(parts), retries, steps

    def __call__(self, prompts: Sequence[RewardPrompt], texts: Sequence[str]) -> list[Score | Unscored]:
        """The score of each response text, in order; Unscored where a reward has no value after all retries.

        A reward that does not score a prompt's domain is no part of its responses' scores.
        """
        scores: list[Score | Unscored] = [Score(0.0, {}) for _ in texts]
        for part in self.parts:
            if not (scored := part.scored(prompts)):
                continue
            values = self._with_retries(part.reward, [prompts[i] for i in scored], [texts[i] for i in scored])
            for index, value in zip(scored, values, strict=True):
                before = scores[index]
                if isinstance(before, Unscored):
                    continue
                if isinstance(value, Unscored):
                    scores[index] = value
                    continue
                name, weighted = part.reward.name, part.weight * value
                parts = {**before.parts, name: before.parts.get(name, 0.0) + weighted}
                scores[index] = Score(sum(parts.values()), parts)
        return self._with_steps(scores, self._steps, prompts, texts) if self._steps else scores

    @staticmethod
    def _with_steps(
        scores: Sequence[Score | Unscored],
        weighted: WeightedSteps,
        prompts: Sequence[RewardPrompt],
        texts: Sequence[str],
    ) -> list[Score | Unscored]:
        return [
            score
            if isinstance(score, Unscored)
            else replace(score, steps=tuple(RewardedStep(step.end, weighted.weight * step.value) for step in steps))
            for score, steps in zip(scores, weighted.rewards(prompts, texts), strict=True)
        ]

    def _with_retries(self, reward: Reward, prompts: Sequence[RewardPrompt], texts: Sequence[str]) -> list[Value]:
        values = list(reward.score(prompts, texts))
        for retry in range(self._retries):
            missing = [index for index, value in enumerate(values) if isinstance(value, Unscored)]
            if not missing:
                break
            time.sleep(FIRST_PAUSE_S * 2**retry)
            again = reward.score([prompts[index] for index in missing], [texts[index] for index in missing])
            for index, value in zip(missing, again, strict=True):
                values[index] = value
        return values
