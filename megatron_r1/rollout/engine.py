"""The protocol of a rollout engine: who samples is a choice of configuration, what is promised is not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from megatron_r1.rollout.sample import Completion, Request, Sampling


@runtime_checkable
class Engine(Protocol):
    """Samples responses with weights that can be replaced."""

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """One completion for each request, in the order of the requests; all with the same weight version."""
        ...

    def update_weights(self, folder: Path, version: str) -> None:
        """Sample from now on with the weights of a Hugging Face folder; later completions carry `version`."""
        ...

    def close(self) -> None:
        """Give back everything that the engine holds; may be called twice."""
        ...
