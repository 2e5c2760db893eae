"""What a rollout engine takes, gives and promises, and its weight sync; which ones do it is a choice of configuration.

A `Completion` cannot be built from a response that the trainer could not train on: each of its tokens has a finite
log-prob and is of known weights, and the reason for its end is known. The log-probs are checked twice: when the engine
gives the completion and when the journal writes the sample; not whenever a sample is copied with a change.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from megatron_r1.errors import NoRolloutCapacity
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


@runtime_checkable
class RolloutEngine(Protocol):
    """Samples from the trainer's weights, on rank 0."""

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Sequence[Outcome]:
        """The outcome of each request, in the order of the requests.

        Completions come from the weights that are current when they are requested. Where another thread may update the
        weights meanwhile, later completions come from newer weights, and one completion may have several versions.

        Raises:
            NoRolloutCapacity: no server is left to respond.
        """
        ...

    @property
    def busy_seconds(self) -> float:
        """Seconds that the engine has spent generating so far."""
        ...

    def abandon(self) -> None:
        """End the calls of `generate` that other threads are in, if there may be any."""
        ...

    def health(self) -> Mapping[str, int]:
        """Requests sent, answered, failed and resent, and restarts of servers, all since the start."""
        ...


class WeightSync(Protocol):
    """Brings the trainer's weights to an engine; every rank has one."""

    def push(self, version: str) -> None:
        """Collective: the engine samples from now on with the current weights; later completions carry `version`."""
        ...


def require_completions(outcomes: Sequence[Outcome]) -> list[Completion]:
    """The completions, where no request may have failed.

    Raises:
        NoRolloutCapacity: a request failed.
    """
    failed = [outcome for outcome in outcomes if isinstance(outcome, FailedRequest)]
    if failed:
        first = failed[0]
        raise NoRolloutCapacity(
            f"{len(failed)} of {len(outcomes)} requests failed; request {first.request_id}: {first.reason}"
        )
    return [outcome for outcome in outcomes if isinstance(outcome, Completion)]
