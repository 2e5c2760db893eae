"""A user's function as a reward: `reward=FILE.py:NAME`, or `reward.custom_function=FILE.py:NAME` among others.

The function gets keyword arguments and gives one number for each response, in order:

    def score(prompts: list[str], responses: list[str], answers: list[str], tasks: list[str]) -> list[float]

One for steps, `reward.step_rewards=FILE.py:NAME`, gives a list for each response instead: for each step, in order, how
many characters of the response there are up to its end, and its reward:

    def steps(prompts, responses, answers, tasks) -> list[list[tuple[int, float]]]

Either may be called by several threads at a time. The file is the user's code, named on the user's own command line,
and runs as part of this program. What it raises, or returns that is not as said, ends the run with one line.
"""

from __future__ import annotations

import importlib.util
import math
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_r1.errors import ConfigError, UserError
from megatron_r1.rewards.reward import RewardPrompt, Value
from megatron_r1.rewards.steps import RewardedStep


class CustomRewardFailed(UserError):
    """The user's function raised, or did not return what it should."""


def load_function(place: str, key: str) -> Callable[..., Any]:
    """The function at FILE.py:NAME.

    Raises:
        ConfigError: there is no such file or function, or the file cannot be loaded.
    """
    file, _, name = place.rpartition(":")
    path = Path(file).expanduser().resolve()
    if not path.is_file():
        raise ConfigError(key, place, f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(f"custom_reward_{path.stem}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(key, place, f"the file cannot be loaded: {where(error, path)}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(key, place, f"{path.name} has no function {name}")
    return function  # type: ignore[no-any-return]


def where(error: BaseException, path: Path) -> str:
    """An error in one line, with the line of the user's file that it comes from."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    line = lines[-1] if lines else getattr(error, "lineno", None)
    said = " ".join(str(error).split())
    return f"{path.name}:{line}: {type(error).__name__}: {said}" if line else f"{type(error).__name__}: {said}"


class CustomFunction:
    """A function of the user's, called with lists and held to what it must return."""

    def __init__(self, place: str, key: str):
        """
        Args:
            place: FILE.py:NAME.
            key: configuration key to name in an error.

        Raises:
            ConfigError: it cannot be loaded.
        """
        self._said, self._function = f"{key}={place}", load_function(place, key)
        self._path = Path(place.rpartition(":")[0]).expanduser().resolve()

    def __str__(self) -> str:
        return self._said

    def __call__[Kind](
        self, prompts: Sequence[RewardPrompt], texts: Sequence[str], read: Callable[[Any], Kind], what: str
    ) -> list[Kind]:
        """What it returns for each response, read.

        Args:
            read: raises TypeError or ValueError for what is not right.
            what: it must return, in words.

        Raises:
            OwnRewardFailed: it raised, or returned something else, or of another length.
        """
        try:
            found = self._function(
                prompts=[prompt.question for prompt in prompts],
                responses=list(texts),
                answers=[prompt.answer for prompt in prompts],
                tasks=[prompt.task for prompt in prompts],
            )
        except Exception as error:
            raise CustomRewardFailed(f"{self._said}: raised {where(error, self._path)}") from error
        try:
            values = [read(value) for value in found]
        except (TypeError, ValueError) as error:
            raise CustomRewardFailed(f"{self._said}: must return {what} ({error})") from error
        if len(values) != len(texts):
            raise CustomRewardFailed(f"{self._said}: returned {len(values)} {what} for {len(texts)} responses")
        return values


class CustomReward:
    """The user's function."""

    name = "custom"

    def __init__(self, place: str):
        self._function = CustomFunction(place, "reward.custom_function")

    def score(self, prompts: Sequence[RewardPrompt], texts: Sequence[str]) -> list[Value]:
        """Raises OwnRewardFailed."""
        return [*self._function(prompts, texts, _finite, "numbers")]


class CustomStepRewards:
    """The user's function for steps; a `StepRewards`."""

    def __init__(self, place: str):
        self._function = CustomFunction(place, "reward.step_rewards")

    def __call__(self, prompts: Sequence[RewardPrompt], texts: Sequence[str]) -> list[list[RewardedStep]]:
        """Raises OwnRewardFailed."""
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
