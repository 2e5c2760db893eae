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
        """What became of each request, in the order of the requests; all completions have the same weight version.

        Raises:
            NoRolloutCapacity: nobody is left to answer.
        """
        ...

    def update_weights(self, folder: Path, version: str) -> None:
        """Sample from now on with the weights of a Hugging Face folder; later completions carry `version`."""
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
