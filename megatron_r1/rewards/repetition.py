"""N-gram repetition penalty (Yeo et al. 2025, "Demystifying Long Chain-of-Thought Reasoning in LLMs", section 4.3: it
prevents length by repetition)."""

from __future__ import annotations

from megatron_r1.rewards.words import words


def repetition(text: str, run: int) -> float:
    """Minus the share of n-grams of `run` words that occurred earlier in the text, from 0 down to nearly -1."""
    all_words = words(text)
    count = len(all_words) - run + 1
    if count < 1:
        return 0.0
    return len({tuple(all_words[start : start + run]) for start in range(count)}) / count - 1.0
