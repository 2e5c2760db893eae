"""The interface of a filter: candidates in, for each the reason why it is dropped, or nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megatron_r1.recipe.candidate import Candidate

Filter = Callable[[Sequence[Candidate]], Sequence[str]]
"""Candidates -> for each why it is dropped; empty where it passes."""


def of_each(problem: Callable[[Candidate], str]) -> Filter:
    """The filter that asks one function about each candidate."""
    return lambda candidates: [problem(candidate) for candidate in candidates]
