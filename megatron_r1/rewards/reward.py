"""The interface of a reward: an object with a name that scores responses in batches.

A rule, a reward model and a judge behind a server all have this shape. A response that gets no value through no fault
of its own (a worker pool that is down, a sandbox that does not start, a server that does not reply) is `Unscored`,
which is not 0.
"""

from __future__ import annotations

from collections.abc import Sequence
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
        """Decides which verifier compares the answer."""


@dataclass(frozen=True, slots=True)
class Unscored:
    """No value, through no fault of the response."""

    reason: str


Value = float | Unscored


class Reward(Protocol):
    """One thing that a response is rewarded for; many threads may call it at a time."""

    @property
    def name(self) -> str:
        """Names its part of a score."""

    def score(self, prompts: Sequence[RewardPrompt], texts: Sequence[str]) -> list[Value]:
        """A value for each response text, in order; `texts[i]` answers `prompts[i]`."""
