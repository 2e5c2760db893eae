"""The scored samples that the trainer gets and the journal keeps, as frozen records."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_r1.rollout.engine import Response, VersionChanges, check_end

StepRewards = tuple[tuple[int, float], ...]
"""Index of the last token of each rewarded step of a response, in order, and the reward of the step."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One scored response, as the trainer and the journal get it."""

    prompt_id: str
    group: int
    """Responses of one group are to one prompt and share a baseline."""
    prompt_length: int
    """Tokens of the prompt."""
    response_length: int
    """Tokens of the response."""
    weight_version: str
    finish_reason: str
    reward: float
    reward_parts: dict[str, float]
    """The weighted parts of the reward by name; they sum to `reward`."""
    in_loss: bool = True
    """Whether its tokens are in the loss; else it only counts in its group's baseline."""
    version_changes: VersionChanges = ()
    """As of the completion."""
    steps: StepRewards = ()
    """Rewards of single steps, which are not part of `reward`."""
    text: str = ""
    """The response as text, without special tokens; empty on ranks that do not score."""
    response: Response | None = None
    """None on a rank that has no pass over it."""

    def __post_init__(self) -> None:
        check_end(self.finish_reason, self.version_changes, self.response_length)
        lengths = self.prompt_length, self.response_length
        if self.response and lengths != (found := (len(self.response.prompt_tokens), len(self.response.tokens))):
            raise ValueError(f"prompt {self.prompt_id}: prompt and response of {found} tokens: must be {lengths}")
        if not all(map(math.isfinite, (self.reward, *(value for _, value in self.steps)))):
            raise ValueError(f"prompt {self.prompt_id}: reward {self.reward}, steps {self.steps}: must be finite")
        ends = [end for end, _ in self.steps]
        if ends != sorted(ends) or not all(0 <= end < self.response_length for end in ends):
            allowed = f"must ascend below {self.response_length}"
            raise ValueError(f"prompt {self.prompt_id}: steps end at tokens {ends}: {allowed}")


def response_of(sample: Sample) -> Response:
    """The response of a sample that this rank has a pass over."""
    assert sample.response is not None, f"prompt {sample.prompt_id}: its tokens are on other ranks"
    return sample.response
