"""The interface of a reward: an object with a name that scores responses in batches.

Rules, reward models and judges all implement it. A response that cannot be scored for a reason that is not its own
fault (a worker pool that is down, a sandbox that does not start, a server that does not reply) is `Unscored`, which is
not 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class RewardPrompt(Protocol):
    """The part of a prompt that a reward may read; `megatron_r1.data.prompts.prompts.Prompt` implements it."""

    @property
    def id(self) -> str: ...

    @property
    def question(self) -> str: ...

    @property
    def answer(self) -> str:
        """The true answer, or other input of the task's verifier, such as tests."""

    @property
    def task(self) -> str:
        """Selects the verifier."""

    @property
    def domain(self) -> str:
        """Selects the rewards: one of `config.reward.DOMAINS`."""


@dataclass(frozen=True, slots=True)
class Unscored:
    """No value, for a reason that is not the response's fault."""

    reason: str


Value = float | Unscored


class Reward(Protocol):
    """One reward of a response; many threads may call it at a time."""

    @property
    def name(self) -> str:
        """Name of its part in a score's breakdown."""

    def score(self, prompts: Sequence[RewardPrompt], texts: Sequence[str]) -> Sequence[Value]:
        """A value for each response text, in order; `texts[i]` is a response to `prompts[i]`."""
