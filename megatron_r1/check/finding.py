"""What a check is given, and what it finds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from megatron_r1.config.pipeline import TRAINING_VERBS
from megatron_r1.config.run import RunConfig
from megatron_r1.errors import ConfigError, UserError


class State(IntEnum):
    """The result of a check; a higher one outweighs a lower one."""

    NOT_APPLICABLE = 0
    PASSED = 1
    UNKNOWN = 2
    WARNING = 3
    REFUSED = 4

    @property
    def text(self) -> str:
        return {0: "-", 1: "ok", 2: "unknown", 3: "warning", 4: "REFUSED"}[self.value]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that a check found."""

    state: State
    text: str
    """What is so."""
    change: str = ""
    """What to change, or how to learn what is unknown."""


@dataclass(frozen=True, slots=True)
class Job:
    """A job that is checked."""

    verb: str
    config: RunConfig
    made_before: tuple[str, ...] = ()
    """Paths that earlier stages of the same recipe will have made."""

    model_known: bool = True
    """Whether `config.model` is that of the weights, for verbs that take it from there."""

    @property
    def trains(self) -> bool:
        return self.verb in TRAINING_VERBS

    @property
    def ranks(self) -> int:
        """Ranks of the trainer."""
        return self.config.check.ranks or self.config.parallel.fewest_ranks()

    @property
    def data_parallel(self) -> int:
        degrees = self.config.parallel
        return max(1, self.ranks // (degrees.tensor * degrees.pipeline * degrees.context))

    @property
    def on_gpus(self) -> bool:
        """Whether the job runs on GPUs."""
        return bool(self.config.check.memory_gb) or self.config.platform == "cuda"


@dataclass(frozen=True, slots=True)
class Check:
    """One row of the table."""

    number: int
    title: str
    find: Callable[[Job], Iterable[Finding]]
    """Yields what it found; nothing, or `passed`, where all is well."""
    applies: Callable[[Job], bool] = lambda job: True


def passed(text: str) -> Finding:
    """A finding that is as it should be, with a figure that is worth showing."""
    return Finding(State.PASSED, text)


def refused(text: str, change: str) -> Finding:
    """A finding with which the job would fail."""
    return Finding(State.REFUSED, text, change)


def warning(text: str, change: str) -> Finding:
    """A finding with which the job runs, but not as one may expect."""
    return Finding(State.WARNING, text, change)


def unknown(text: str, change: str = "") -> Finding:
    """What cannot be known here."""
    return Finding(State.UNKNOWN, text, change)


def refusals(rule: Callable[..., Any], *arguments: Any) -> Iterator[Finding]:
    """What a rule of the configuration refuses, as a finding."""
    try:
        rule(*arguments)
    except UserError as error:
        yield finding_of(error)


def finding_of(error: UserError) -> Finding:
    """An error of the configuration or of a file as a finding."""
    if isinstance(error, ConfigError):
        return refused(f"{error.key}={error.value}", error.allowed)
    return refused(" ".join(str(error).split()), "")
