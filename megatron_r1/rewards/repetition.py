"""Penalty for saying the same again (Yeo et al. 2025, "Demystifying Long Chain-of-Thought Reasoning in LLMs",
section 4.3: an n-gram repetition penalty keeps length from being bought by repetition)."""

from __future__ import annotations

from megatron_r1.rewards.words import words


def repetition(text: str, run: int) -> float:
    """Minus the share of runs of `run` words that stood in the text before, from 0 down to nearly -1."""
    said = words(text)
    count = len(said) - run + 1
    if count < 1:
        return 0.0
    return len({tuple(said[start : start + run]) for start in range(count)}) / count - 1.0
