"""Responses that somebody has judged."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Judged:
    """A response, and what a judge said of it."""

    question: str
    response: str
    """Reasoning and summary, as a model wrote them."""
    judgement: str = ""
    """The judge's reasoning, as it follows the response; empty where there is none."""


@dataclass(frozen=True, slots=True)
class Item:
    """What one term of a loss is about, a reward model's or that of direct preference optimization."""

    task: str
    first: Judged
    """Of a pair, the better response."""
    second: Judged | None = None
    """Of a pair, the worse response."""
    safe: bool = True
    """Label of a response that stands alone."""

    @property
    def sides(self) -> tuple[Judged, ...]:
        """Its responses, the better one first."""
        return (self.first,) if self.second is None else (self.first, self.second)
