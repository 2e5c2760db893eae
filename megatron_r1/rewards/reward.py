"""What a reward is: an object with a name that scores answers in batches.

A rule, a reward model behind a server and a judge all have this shape. What could not be judged for no fault of the
answer (a worker pool that is down, a sandbox that does not start, a server that does not reply) is `Unscored`, which
is something else than 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol


class RewardPrompt(Protocol):
    """What a reward may know of a prompt; `megatron_r1.data.prompts.prompts.Prompt` is one."""

    @property
    def id(self) -> str: ...

    @property
    def question(self) -> str: ...

    @property
    def answer(self) -> str:
        """The truth: an answer, or what the task's verifier needs."""

    @property
    def task(self) -> str:
        """Which verifier judges the answer."""


@dataclass(frozen=True, slots=True)
class Unscored:
    """No verdict, for no fault of the answer."""

    reason: str


Value = float | Unscored


class Reward(Protocol):
    """One thing that an answer is rewarded for; may be asked by many threads at a time."""

    @property
    def name(self) -> str:
        """Under which its part of a score is recorded."""

    def score(self, prompts: Sequence[RewardPrompt], texts: Sequence[str]) -> list[Value]:
        """A value for each response text, in order; `texts[i]` answers `prompts[i]`."""


@dataclass(frozen=True, slots=True)
class Rule:
    """A reward that is a pure function of one prompt and one response text."""

    name: str
    function: Callable[[RewardPrompt, str], float]

    def score(self, prompts: Sequence[RewardPrompt], texts: Sequence[str]) -> list[Value]:
        return [self.function(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
