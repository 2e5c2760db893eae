"""reasoning, paragraphs and code: the reasoning says something, in short paragraphs and without code (DeepSeek-R1
report, section 2.3.3: chains of thought with long paragraphs and code blocks are filtered out)."""

from __future__ import annotations

import re

from megatron_r1.recipe.candidate import Candidate
from megatron_r1.recipe.plain_text import count_words, signed_words

_FENCE = re.compile(r"```|~~~|<code>|\\begin\{(?:lstlisting|verbatim|minted)\}")
_CODE_LINE = re.compile(
    r"^\s*(?:def \w+\(.*\).*:|class \w+(?:\(.*\))?:|from \w[\w.]* import \w.*|import \w[\w.]*(?: as \w+)?|"
    r"#include\s*[<\"].*|for \w+(?:, ?\w+)* in .+:|elif .+:|else:|return [\w.()\[\]+*/ -]+;?|print\(.*\);?|"
    r"(?:public|private|static|int|long|double|float|char|void|auto|const|var) \w.*[;{])\s*$",
    re.MULTILINE,
)
"""A line of Python, C or Java that is no sentence and no equation."""
LONGEST_TRIVIAL = 4000
"""Characters beyond which no reasoning is trivial."""
CODE_LINES = 2
"""Such lines that make a program."""


def trivial_reasoning(candidate: Candidate, fewest_words: int) -> str:
    """Why the reasoning counts as empty or trivial: missing, too short, or nothing but question or answer again."""
    if len(candidate.reasoning) > LONGEST_TRIVIAL:
        return ""
    reasoning = signed_words(candidate.reasoning)
    if not reasoning:
        return "has no reasoning"
    if len(reasoning) < fewest_words:
        return f"its reasoning has {len(reasoning)} words"
    if reasoning == signed_words(candidate.question):
        return "its reasoning repeats the question"
    return "its reasoning repeats the summary" if reasoning == signed_words(candidate.summary) else ""


def long_paragraph(candidate: Candidate, most_words: int) -> str:
    """Why the reasoning counts as rambling: a paragraph, a text without a line break, has too many words."""
    longest = max(map(count_words, candidate.reasoning.splitlines()), default=0)
    return f"a paragraph of its reasoning has {longest} words" if longest > most_words else ""


def code_in_reasoning(candidate: Candidate) -> str:
    """Why the reasoning counts as holding code: a fenced block, or lines of a program."""
    text = candidate.reasoning
    if found := _FENCE.search(text):
        return f"its reasoning holds code: {found[0]}"
    lines = _CODE_LINE.findall(text)
    return f"its reasoning holds code: {lines[0].strip()[:40]}" if len(lines) >= CODE_LINES else ""
