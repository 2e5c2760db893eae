"""The requests and completions of a rollout engine, and the scored samples that the trainer gets, as frozen records.

A `Completion` cannot be built from a response that the trainer could not train on: each of its tokens has a finite
log-prob and is of known weights, and the reason for its end is known. The log-probs are checked twice: when the engine
gives the completion and when the journal writes the sample; not whenever a sample is copied with a change.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_r1.rollout.routed_experts import RoutedExperts, RoutedLayers

FINISH_REASONS = ("stop", "length")
LOGPROB_SLACK = 1e-3
"""A log-prob may exceed 0 by rounding of the engine's softmax, never by more than this."""


@dataclass(frozen=True, slots=True)
class Request:
    """A request for one response to one prompt."""

    id: str
    """Unique within a call of `RolloutEngine.generate`."""
    prompt_tokens: tuple[int, ...]
    """Token ids of the prompt; at least one."""

    def __post_init__(self) -> None:
        if not self.prompt_tokens:
            raise ValueError(f"request {self.id}: the prompt has no tokens")


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn."""

    temperature: float
    """Logits are divided by it; 0 takes the most likely token."""
    top_p: float
    """Nucleus: tokens are drawn from the smallest set with this probability; 1 is the whole vocabulary."""
    max_tokens: int
    """Longest response, in tokens."""
    stop_tokens: tuple[int, ...]
    """A response ends with the first of these tokens, which belongs to the response."""
    seed: int
    """For engines that can be seeded."""
    routed: RoutedLayers | None = None
    """The layers whose experts each completion records; None records none."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature}: must be finite and at least 0")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: must be above 0 and at most 1")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens={self.max_tokens}: must be at least 1")


VersionChanges = tuple[tuple[int, str], ...]
"""Where weights changed during a response: index of the first token that newer weights sampled, and their version."""


StepRewards = tuple[tuple[int, float], ...]
"""Index of the last token of each rewarded step of a response, in order, and the reward of the step."""


def check_response(
    prompt: tuple[int, ...],
    tokens: tuple[int, ...],
    logprobs: tuple[float, ...],
    finish_reason: str,
    routed: RoutedExperts | None,
    version_changes: VersionChanges,
) -> None:
    """Raise ValueError, naming the fault, unless these fit together as a response."""
    if not tokens:
        raise ValueError("the response has no tokens")
    if len(tokens) != len(logprobs):
        raise ValueError(f"{len(tokens)} response tokens but {len(logprobs)} log-probs")
    if finish_reason not in FINISH_REASONS:
        raise ValueError(f"finish reason {finish_reason!r}: must be one of {', '.join(FINISH_REASONS)}")
    bounds = [0, *(index for index, _ in version_changes), len(tokens)]
    if bounds != sorted(set(bounds)):
        raise ValueError(
            f"weights changed at response tokens {bounds[1:-1]}: must ascend between 1 and {len(tokens) - 1}"
        )
    inputs = len(prompt) + len(tokens) - 1
    if routed is not None and routed.shape[0] != inputs:
        raise ValueError(f"routed experts of {routed.shape[0]} tokens: must be of the {inputs} that the model read")


def check_logprobs(logprobs: tuple[float, ...]) -> None:
    """Raise ValueError, naming the token, unless all can be trained on."""
    for index, logprob in enumerate(logprobs):
        if not (math.isfinite(logprob) and logprob <= LOGPROB_SLACK):
            raise ValueError(f"log-prob {logprob} at response token {index}: must be finite and at most 0")


@dataclass(frozen=True, slots=True)
class Completion:
    """One response of the engine.

    `logprobs[i]` is the natural-log probability of `response_tokens[i]` under the distribution that the engine's
    docstring names. Raises ValueError where tokens, log-probs and finish reason do not fit together.
    """

    request_id: str
    prompt_tokens: tuple[int, ...]
    response_tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str
    """``stop``: the last token is a stop token; ``length``: `Sampling.max_tokens` was reached."""
    weight_version: str
    """Version of the weights that the first token was sampled with, and all others unless `version_changes` says so."""
    routed_experts: RoutedExperts | None = None
    """The experts to which the engine routed each input token, where `Sampling.routed` requests them."""
    version_changes: VersionChanges = ()

    def __post_init__(self) -> None:
        check_response(
            self.prompt_tokens, self.response_tokens, self.logprobs, self.finish_reason, self.routed_experts,
            self.version_changes,
        )  # fmt: skip
        check_logprobs(self.logprobs)


@dataclass(frozen=True, slots=True)
class FailedRequest:
    """A request that got no usable response."""

    request_id: str
    reason: str
    """Why, on one line."""


Outcome = Completion | FailedRequest


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
