"""language: reasoning and summary are in one language, the question's (DeepSeek-R1 report, section 2.3.3: chains of
thought with mixed languages are filtered out)."""

from __future__ import annotations

import re
from collections import Counter

from megatron_r1.recipe.candidate import Candidate
from megatron_r1.rewards.language import question_language, requested_language
from megatron_r1.rewards.words import language_of, languages, prose, words

_SYMBOL = re.compile("[\u0370-\u03ff]+")
"""Greek letters, which name variables and angles in all languages."""
_LATIN = re.compile("[a-z\u00c0-\u024f'\u2019-]+")
_POINTS = re.compile(r"(?<![A-Za-z])[A-Z]{4,6}(?![A-Za-z])")
_TRANSLATION = re.compile("translat|\u7ffb\u8bd1|\u8bd1[\u6210\u4e3a]", re.IGNORECASE)
SHOWN = 5
"""Words of another language that the reason shows."""


def mixed_language(candidate: Candidate, share: float) -> str:
    """Why a response counts as mixed: fewer than `share` of a part's words are in the target language.

    The target is the language that the question requests, else its own, else that of most of the response. Where it
    asks for a translation, each part may be in a language of its own, and the reasoning may quote the summary.
    Formulas, code, units, names of points and words that stand in the question are of every language.
    """
    translates = _TRANSLATION.search(candidate.question) is not None
    targets = ("en", "zh") if translates else (target_language(candidate),)
    known = {word for message in candidate.before for word in words(message["content"])}
    quoted = {*words(candidate.summary)} if translates else set()
    for name, text, others in (
        ("reasoning", candidate.reasoning, known | quoted),
        ("summary", candidate.summary, known),
    ):
        found = Counter(words(prose(_POINTS.sub(_point_names, text))))
        target, foreign = min(
            ((each, _foreign(found, each, others)) for each in targets), key=lambda pair: len(pair[1])
        )
        count, total = sum(found[word] for word in foreign), found.total()
        if foreign and total - count < share * total:
            return f"{count} of {total} words of its {name} are not {target}: {' '.join(foreign[:SHOWN])}"
    return ""


def _foreign(found: Counter[str], target: str, known: set[str]) -> list[str]:
    """The words that are neither known nor in the target language."""
    return [word for word in found if word not in known and not _is_in(word, target)]


def target_language(candidate: Candidate) -> str:
    """en or zh."""
    question = candidate.question if languages(candidate.question) else candidate.response
    return requested_language(candidate.question) or question_language(question)


def _is_in(word: str, target: str) -> bool:
    if _SYMBOL.fullmatch(word) or language_of(word) == target:
        return True
    return target == "en" and _LATIN.fullmatch(word) is not None


def _point_names(match: re.Match[str]) -> str:
    """Nothing for letters in alphabetical order, which name a figure's corners: ABCD; other capitals are a word."""
    return " " if list(match[0]) == sorted(set(match[0])) else match[0]
