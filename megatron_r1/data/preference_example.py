"""A preference pair, or one response with a safety label."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LabelledResponse:
    """A response to a question, with the labeller's critique."""

    question: str
    response: str
    """Reasoning and summary, as a model wrote them."""
    critique: str = ""
    """Reasoning about the response, which follows it in training; empty where there is none."""


@dataclass(frozen=True, slots=True)
class PreferenceExample:
    """One training example of a reward model or of direct preference optimization."""

    task: str
    chosen: LabelledResponse
    """The better response of a pair; of a pointwise example its only response, whatever its label."""
    rejected: LabelledResponse | None = None
    """The worse response of a pair; None for a pointwise example."""
    safe: bool = True
    """Label of the response of a pointwise example."""

    @property
    def question(self) -> str:
        return self.chosen.question

    @property
    def responses(self) -> tuple[LabelledResponse, ...]:
        """One or two, the chosen one first."""
        return (self.chosen,) if self.rejected is None else (self.chosen, self.rejected)
