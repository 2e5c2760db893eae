"""What a rollout engine and its weight sync promise; which ones do it is a choice of configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from megatron_r1.errors import NoRolloutCapacity
from megatron_r1.rollout.sample import Completion, FailedRequest, Outcome, Request, Sampling


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
