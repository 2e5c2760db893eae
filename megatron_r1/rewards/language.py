"""Language consistency: the share of the reasoning's words that are in the target language.

DeepSeek-R1, section 2.3.2 (equation 7 of the Nature version): Num(Words_target) / Num(Words) over the chain of
thought, added to the other rewards.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_r1.rewards.extract import END_THINK, first_thought
from megatron_r1.rewards.reward import RewardPrompt, Value
from megatron_r1.rewards.words import languages


class LanguageReward:
    """Language consistency with a fixed language, or with the language of each question.

    Args:
        target: en, zh, or question.
    """

    name = "language"

    def __init__(self, target: str):
        self._target = target

    def score(self, prompts: Sequence[RewardPrompt], texts: Sequence[str]) -> list[Value]:
        follow = self._target == "question"
        return [
            language_consistency(text, question_language(prompt.question) if follow else self._target)
            for prompt, text in zip(prompts, texts, strict=True)
        ]


def language_consistency(text: str, target: str) -> float:
    """Share of `target` words (en or zh) in the reasoning, 0 to 1; 0 where it has no words."""
    counts = languages(reasoning(text))
    total = counts.total()
    return counts[target] / total if total else 0.0


def reasoning(text: str) -> str:
    """The text from the first think tag, or the start, to the end of the reasoning, or of the text."""
    thought = first_thought(text)
    return text[slice(*thought)] if thought else text.partition(END_THINK)[0]


def question_language(question: str) -> str:
    """The language of most of a question's words; English where it has none."""
    counts = languages(question)
    # A Chinese word takes two characters on average, and Chinese questions quote English names.
    return "zh" if counts["zh"] > counts["en"] else "en"
