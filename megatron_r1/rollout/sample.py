"""The scored samples that the trainer gets and the journal keeps, as frozen records."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_r1.rollout.engine import VersionChanges, check_response
from megatron_r1.rollout.routed_experts import RoutedExperts

StepRewards = tuple[tuple[int, float], ...]
"""Index of the last token of each rewarded step of a response, in order, and the reward of the step."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One scored response, as the trainer and the journal get it."""

    prompt_id: str
    group: int
    """Responses of one group are to one prompt and share a baseline."""
    prompt_tokens: tuple[int, ...]
    response_tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    weight_version: str
    finish_reason: str
    text: str
    """The response as text, without special tokens."""
    reward: float
    reward_parts: dict[str, float]
    """The weighted parts of the reward by name; they sum to `reward`."""
    in_loss: bool = True
    """Whether its tokens are in the loss; else it only counts in its group's baseline."""
    routed_experts: RoutedExperts | None = None
    """As of the completion."""
    version_changes: VersionChanges = ()
    """As of the completion."""
    steps: StepRewards = ()
    """Rewards of single steps, which are not part of `reward`."""

    def __post_init__(self) -> None:
        check_response(
            self.prompt_tokens, self.response_tokens, self.logprobs, self.finish_reason, self.routed_experts,
            self.version_changes,
        )  # fmt: skip
        if not all(map(math.isfinite, (self.reward, *(value for _, value in self.steps)))):
            raise ValueError(f"prompt {self.prompt_id}: reward {self.reward}, steps {self.steps}: must be finite")
        ends = [end for end, _ in self.steps]
        if ends != sorted(ends) or not all(0 <= end < len(self.response_tokens) for end in ends):
            allowed = f"must ascend below {len(self.response_tokens)}"
            raise ValueError(f"prompt {self.prompt_id}: steps end at tokens {ends}: {allowed}")
