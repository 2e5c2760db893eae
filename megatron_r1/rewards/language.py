"""Language consistency: the share of the reasoning's words that are in the target language.

DeepSeek-R1, section 2.3.2 (equation 7 of the Nature version): Num(Words_target) / Num(Words) over the chain of
thought, added to the other rewards.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from megatron_r1.rewards.extract import END_THINK, first_thought
from megatron_r1.rewards.reward import RewardPrompt
from megatron_r1.rewards.words import languages

NAMES = {
    "english": "en", "\u82f1\u6587": "en", "\u82f1\u8bed": "en", "chinese": "zh", "mandarin": "zh",
    "\u4e2d\u6587": "zh", "\u6c49\u8bed": "zh",
}  # fmt: skip
_ENGLISH_VERBS = "answer|respond|reply|think|reason|write|explain|solve|show|speak|present|output|state"
_CHINESE_VERBS = "\u7b54|\u56de\u590d|\u601d\u8003|\u63a8\u7406|\u89e3|\u5199|\u8bf4\u660e|\u8f93\u51fa"
_CHINESE_NAMES = "\u4e2d\u6587|\u6c49\u8bed|\u82f1\u6587|\u82f1\u8bed"
REQUEST = re.compile(
    rf"\b(?:{_ENGLISH_VERBS})\b[^.?!\n]{{0,80}}?\b(?:in|using)\s+(english|chinese|mandarin)\b"
    rf"|\bin\s+(english|chinese|mandarin)\s*(?:,|only|please)"
    rf"|[\u7528\u4ee5](?:\u7b80\u4f53)?({_CHINESE_NAMES})[^\u3002\uff1f\uff01\n]{{0,12}}?(?:{_CHINESE_VERBS})"
    rf"|(?:{_CHINESE_VERBS})[^\u3002\uff1f\uff01\n]{{0,12}}?[\u7528\u4ee5]({_CHINESE_NAMES})",
    re.IGNORECASE,
)
"""A request for a language, in English or Chinese."""


class LanguageReward:
    """Language consistency with a fixed language, or with the language of each question.

    Args:
        target: en, zh, or question.
        instructions: what the chat template and the system prompt say beside each question.
    """

    name = "language"

    def __init__(self, target: str, instructions: str = ""):
        self._target, self._requested = target, requested_language(instructions)

    def score(self, prompts: Sequence[RewardPrompt], texts: Sequence[str]) -> list[float]:
        return [
            language_consistency(text, self._target_of(prompt.question))
            for prompt, text in zip(prompts, texts, strict=True)
        ]

    def _target_of(self, question: str) -> str:
        if self._target != "question":
            return self._target
        return requested_language(question) or self._requested or question_language(question)


def language_consistency(text: str, target: str) -> float:
    """Share of `target` words (en or zh) in the reasoning, 0 to 1; 0 where it has no words."""
    counts = languages(reasoning(text))
    total = counts.total()
    return counts[target] / total if total else 0.0


def reasoning(text: str) -> str:
    """The text from the first think tag, or the start, to the end of the reasoning, or of the text."""
    thought = first_thought(text)
    return text[slice(*thought)] if thought else text.partition(END_THINK)[0]


def requested_language(text: str) -> str:
    """The language that the last explicit request of a text names, as "answer in Chinese" does; empty without one."""
    found = [name.lower() for match in REQUEST.finditer(text) for name in match.groups() if name]
    return NAMES[found[-1]] if found else ""


def question_language(question: str) -> str:
    """The language of most of a question's words; English where it has none."""
    counts = languages(question)
    # A Chinese word takes two characters on average, and Chinese questions quote English names.
    return "zh" if counts["zh"] > counts["en"] else "en"
