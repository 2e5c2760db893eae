"""The protocol of a rollout engine: who samples is a choice of configuration, what is promised is not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from megatron_r1.errors import NoRolloutCapacity
from megatron_r1.rollout.sample import Completion, Lost, Outcome, Request, Sampling


@runtime_checkable
class Engine(Protocol):
    """Samples responses with weights that can be replaced."""

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Sequence[Outcome]:
        """What became of each request, in the order of the requests.

        Completions come from the weights that are current when they are asked for. Where weights may be replaced
        meanwhile, by another thread, later ones come from newer weights, and one may have several versions.

        Raises:
            NoRolloutCapacity: nobody is left to answer.
        """
        ...

    def update_weights(self, folder: Path, version: str) -> None:
        """Sample from now on with the weights of a Hugging Face folder; later completions carry `version`."""
        ...

    @property
    def busy_seconds(self) -> float:
        """Seconds that it has spent answering so far."""
        ...

    def abandon(self) -> None:
        """End the calls of `generate` that other threads are in, if there may be any."""
        ...

    def close(self) -> None:
        """Give back everything that the engine holds; may be called twice."""
        ...


def all_answered(outcomes: Sequence[Outcome]) -> list[Completion]:
    """The completions, where nothing may be missing.

    Raises:
        NoRolloutCapacity: a request was lost.
    """
    lost = [outcome for outcome in outcomes if isinstance(outcome, Lost)]
    if lost:
        raise NoRolloutCapacity(
            f"{len(lost)} of {len(outcomes)} requests were lost; request {lost[0].request_id}: {lost[0].reason}"
        )
    return [outcome for outcome in outcomes if isinstance(outcome, Completion)]
