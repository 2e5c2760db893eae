"""finished: the response ended by itself and was not cut off at the longest length."""

from __future__ import annotations

from megatron_r1.recipe.candidate import Candidate
from megatron_r1.rewards.extract import END_THINK, THINK


def unfinished(candidate: Candidate) -> str:
    """Why a response counts as unfinished; a row that is a prompt has none to finish."""
    if candidate.finish_reason not in ("", "stop"):
        return f"finish_reason is {candidate.finish_reason}"
    if candidate.response.count(THINK) > candidate.response.count(END_THINK):
        return "its reasoning is never closed"
    return ""
