"""What a rollout engine takes, gives and promises, and its weight sync; which ones do it is a choice of configuration.

A `Response` cannot be built unless the trainer can train on it: each of its tokens has a finite log-prob. So tokens and
log-probs are checked once, where an engine makes them of a reply, or the journal of a file.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from megatron_r1.errors import ConfigError, NoRolloutCapacity
from megatron_r1.rollout.routed_experts import RoutedLayers

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


@dataclass(frozen=True, slots=True, eq=False)
class Response:
    """A prompt and the response to it, as arrays. Raises ValueError where the trainer could not train on it."""

    prompt_tokens: np.ndarray
    """[P], int32."""
    tokens: np.ndarray
    """[R], int32: at least one."""
    logprobs: np.ndarray
    """[R], float32: natural logarithms under the distribution that the engine's docstring names, finite."""
    routed_experts: np.ndarray | None = None
    """[P + R - 1, N, K], unsigned: the experts to which the engine routed each input, where they were recorded."""

    def __post_init__(self) -> None:
        if not len(self.tokens):
            raise ValueError("the response has no tokens")
        if self.tokens.shape != self.logprobs.shape:
            raise ValueError(f"{len(self.tokens)} response tokens but {len(self.logprobs)} log-probs")
        usable_R = np.isfinite(self.logprobs) & (self.logprobs <= LOGPROB_SLACK)
        if not usable_R.all():
            index = int(usable_R.argmin())
            told = f"log-prob {self.logprobs[index]} at response token {index}"
            raise ValueError(f"{told}: must be finite and at most 0")
        inputs = len(self.prompt_tokens) + len(self.tokens) - 1
        if self.routed_experts is not None and len(self.routed_experts) != inputs:
            raise ValueError(
                f"routed experts of {len(self.routed_experts)} tokens: must be of the {inputs} that the model read"
            )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Response) or (self.routed_experts is None) != (other.routed_experts is None):
            return False
        pairs = [
            (self.prompt_tokens, other.prompt_tokens),
            (self.tokens, other.tokens),
            (self.logprobs, other.logprobs),
        ]
        if self.routed_experts is not None and other.routed_experts is not None:
            pairs.append((self.routed_experts, other.routed_experts))
        return all(np.array_equal(mine, its) for mine, its in pairs)


def check_lengths(requests: Sequence[Request], sampling: Sampling, context_length: int) -> None:
    """Refuse requests whose prompt and longest response exceed the model's context.

    Raises:
        ConfigError: names the first.
    """
    for request in requests:
        if (length := len(request.prompt_tokens)) + sampling.max_tokens > context_length:
            allowed = f"with the {length} prompt tokens of request {request.id} at most {context_length} in all"
            raise ConfigError("rollout.max_response_tokens", sampling.max_tokens, allowed)


def int32(values: Sequence[int]) -> np.ndarray:
    """Tokens as an array.

    Raises:
        ValueError: one is no integer, or none of 32 bits.
    """
    try:
        return np.frombuffer(array("i", values), np.int32)
    except (TypeError, OverflowError):
        raise ValueError(f"tokens {str(values)[:80]}: must be integers of 32 bits") from None


def check_end(finish_reason: str, version_changes: VersionChanges, tokens: int) -> None:
    """Raise ValueError unless a response of so many tokens may have ended, and its weights changed, like this."""
    if finish_reason not in FINISH_REASONS:
        raise ValueError(f"finish reason {finish_reason!r}: must be one of {', '.join(FINISH_REASONS)}")
    bounds = [0, *(index for index, _ in version_changes), tokens]
    if bounds != sorted(set(bounds)):
        raise ValueError(f"weights changed at response tokens {bounds[1:-1]}: must ascend between 1 and {tokens - 1}")


@dataclass(frozen=True, slots=True)
class Completion:
    """One response of the engine. Raises ValueError where its fields do not fit together."""

    request_id: str
    response: Response
    finish_reason: str
    """``stop``: the last token is a stop token; ``length``: `Sampling.max_tokens` was reached."""
    weight_version: str
    """Version of the weights that the first token was sampled with, and all others unless `version_changes` says so."""
    version_changes: VersionChanges = ()

    def __post_init__(self) -> None:
        check_end(self.finish_reason, self.version_changes, len(self.response.tokens))


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
