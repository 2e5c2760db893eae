"""A function of the user's own as a reward: `reward=FILE.py:NAME`, or `reward.function=FILE.py:NAME` among others.

The function gets keyword arguments and gives one number for each response, in order:

    def score(prompts: list[str], responses: list[str], answers: list[str], tasks: list[str]) -> list[float]

It may be called by several threads at a time. The file is the user's code, named on the user's own command line, and
runs as part of this program. What it raises, or returns that is no list of finite numbers, ends the run with one line.
"""

from __future__ import annotations

import importlib.util
import math
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_r1.errors import ConfigError, UserError
from megatron_r1.rewards.reward import Question, Value


class OwnRewardFailed(UserError):
    """The user's function raised, or did not return what it should."""


def load_function(place: str) -> Callable[..., Any]:
    """The function at FILE.py:NAME.

    Raises:
        ConfigError: there is no such file or function, or the file cannot be loaded.
    """
    file, _, name = place.rpartition(":")
    path = Path(file).expanduser().resolve()
    if not path.is_file():
        raise ConfigError("reward.function", place, f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(f"own_reward_{path.stem}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError("reward.function", place, f"the file cannot be loaded: {where(error, path)}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError("reward.function", place, f"{path.name} has no function {name}")
    return function  # type: ignore[no-any-return]


def where(error: BaseException, path: Path) -> str:
    """An error in one line, with the line of the user's file that it comes from."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    line = lines[-1] if lines else getattr(error, "lineno", None)
    said = " ".join(str(error).split())
    return f"{path.name}:{line}: {type(error).__name__}: {said}" if line else f"{type(error).__name__}: {said}"


class OwnReward:
    """The user's function."""

    name = "own"

    def __init__(self, place: str):
        self._place, self._function = place, load_function(place)
        self._path = Path(place.rpartition(":")[0]).expanduser().resolve()

    def score(self, prompts: Sequence[Question], texts: Sequence[str]) -> list[Value]:
        """Raises OwnRewardFailed."""
        try:
            values = self._function(
                prompts=[prompt.question for prompt in prompts],
                responses=list(texts),
                answers=[prompt.answer for prompt in prompts],
                tasks=[prompt.task for prompt in prompts],
            )
        except Exception as error:
            raise OwnRewardFailed(f"reward.function={self._place}: raised {where(error, self._path)}") from error
        try:
            numbers = [float(value) for value in values]
        except (TypeError, ValueError) as error:
            raise OwnRewardFailed(f"reward.function={self._place}: must return numbers ({error})") from error
        if len(numbers) != len(texts):
            said = f"returned {len(numbers)} numbers for {len(texts)} responses"
            raise OwnRewardFailed(f"reward.function={self._place}: {said}")
        bad = next((number for number in numbers if not math.isfinite(number)), None)
        if bad is not None:
            raise OwnRewardFailed(f"reward.function={self._place}: returned {bad}; every number must be finite")
        return list(numbers)
