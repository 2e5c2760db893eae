"""length: a response is neither too short nor too long (R1's responses are bounded by a context of 32,768 tokens)."""

from __future__ import annotations

from megatron_r1.recipe.candidate import Candidate


def bad_length(candidate: Candidate, shortest: int, longest: int) -> str:
    """Why the number of characters of a response is out of bounds; a longest of 0 sets no limit."""
    length = len(candidate.response.strip())
    if length < shortest:
        return f"has {length} characters"
    return f"has {length} characters" if longest and length > longest else ""
