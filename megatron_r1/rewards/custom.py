"""A user's function as a reward: `reward=FILE.py:NAME`, or `reward.custom_function=FILE.py:NAME` beside other rewards.

The function gets keyword arguments and returns one number for each response, in order:

    def score(prompts: list[str], responses: list[str], answers: list[str], tasks: list[str]) -> list[float]

A function for reasoning steps, `reward.step_rewards=FILE.py:NAME`, returns a list for each response instead: for each
step, in order, the number of characters of the response up to the end of the step, and its reward:

    def steps(prompts, responses, answers, tasks) -> list[list[tuple[int, float]]]

Several threads may call either function at a time. The file is the user's own code, which the user names on the command
line, and it runs in this process. An exception or an invalid return value ends the run with an error of one line.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_r1.data.user_function import load_function, where
from megatron_r1.errors import UserError
from megatron_r1.rewards.reward import RewardPrompt, Value
from megatron_r1.rewards.steps import RewardedStep


class CustomRewardFailed(UserError):
    """The user's function raised, or returned an invalid value."""


class CustomFunction:
    """Calls a user's function with lists, and checks its return value."""

    def __init__(self, location: str, key: str):
        """
        Args:
            location: FILE.py:NAME.
            key: configuration key to name in an error.

        Raises:
            ConfigError: the function cannot be loaded.
        """
        self._name, self._function = f"{key}={location}", load_function(location, key)
        self._path = Path(location.rpartition(":")[0]).expanduser().resolve()

    def __str__(self) -> str:
        return self._name

    def __call__[Kind](
        self, prompts: Sequence[RewardPrompt], texts: Sequence[str], read: Callable[[Any], Kind], what: str
    ) -> list[Kind]:
        """The function's values, one for each response, converted by `read`.

        Args:
            read: converts one value; raises TypeError or ValueError for an invalid one.
            what: description of valid return values, for errors.

        Raises:
            CustomRewardFailed: the function raised, or returned an invalid value or another number of values.
        """
        try:
            found = self._function(
                prompts=[prompt.question for prompt in prompts],
                responses=list(texts),
                answers=[prompt.answer for prompt in prompts],
                tasks=[prompt.task for prompt in prompts],
            )
        except Exception as error:
            raise CustomRewardFailed(f"{self._name}: raised {where(error, self._path)}") from error
        try:
            values = [read(value) for value in found]
        except (TypeError, ValueError) as error:
            raise CustomRewardFailed(f"{self._name}: must return {what} ({error})") from error
        if len(values) != len(texts):
            raise CustomRewardFailed(f"{self._name}: returned {len(values)} {what} for {len(texts)} responses")
        return values


class CustomReward:
    """The user's function as a reward."""

    name = "custom"

    def __init__(self, location: str):
        self._function = CustomFunction(location, "reward.custom_function")

    def score(self, prompts: Sequence[RewardPrompt], texts: Sequence[str]) -> list[Value]:
        """Raises CustomRewardFailed."""
        return [*self._function(prompts, texts, _finite, "numbers")]


class CustomStepRewards:
    """The user's function for reasoning steps; a `StepRewards`."""

    def __init__(self, location: str):
        self._function = CustomFunction(location, "reward.step_rewards")

    def __call__(self, prompts: Sequence[RewardPrompt], texts: Sequence[str]) -> list[list[RewardedStep]]:
        """Raises CustomRewardFailed."""
        found = self._function(prompts, texts, _steps, "lists of (end, reward)")
        for steps, text in zip(found, texts, strict=True):
            ends = [step.end for step in steps]
            if ends != sorted(ends) or not all(0 < end <= len(text) for end in ends):
                allowed = f"must ascend, up to the {len(text)} characters of the response"
                raise CustomRewardFailed(f"{self._function}: returned steps that end at {ends}: {allowed}")
        return found


def _finite(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{number} is not finite")
    return number


def _steps(value: Any) -> list[RewardedStep]:
    return [RewardedStep(int(end), _finite(reward)) for end, reward in value]
