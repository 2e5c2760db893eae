"""Votes of several responses to one prompt: each for the answer that it gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from megatron_r1.rewards.accuracy import Accuracy
from megatron_r1.rewards.reward import RewardPrompt


class Votes(NamedTuple):
    """How often each answer was given."""

    correct: int
    """Votes for the true answer."""
    wrong: tuple[int, ...]
    """Votes for each other answer."""
    abstained: int
    """Responses without an answer."""


def count_votes(
    accuracy: Accuracy, prompt: RewardPrompt, texts: Sequence[str], correct: Sequence[float]
) -> Votes | None:
    """The votes of the responses to one prompt; None where answers cannot be compared.

    Answers count as one where the verifier finds them equal, as it does an answer and the truth: 0.5 and 1/2. All
    correct responses vote for the true answer, however they spell it.

    Args:
        correct: 1 for each correct response.
    """
    if not accuracy.has_answers(prompt):
        return None
    answers = [accuracy.answer(text) for text, right in zip(texts, correct, strict=True) if not right]
    counts: dict[str, int] = {}
    for answer in answers:
        if answer is not None:
            known = answer if answer in counts else _known(accuracy, prompt, answer, counts)
            counts[known] = counts.get(known, 0) + 1
    return Votes(int(sum(correct)), tuple(counts.values()), answers.count(None))


def _known(accuracy: Accuracy, prompt: RewardPrompt, answer: str, counts: dict[str, int]) -> str:
    """The answer that was counted before and equals this one; itself where there is none."""
    return next((other for other in counts if accuracy.same_answer(prompt, answer, other)), answer)
