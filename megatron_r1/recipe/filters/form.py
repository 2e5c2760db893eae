"""format, tags and readable: reasoning and summary stand where they belong, and both can be read (DeepSeek-R1 report,
section 2.3.1: R1-Zero's outputs are poorly readable, cold-start data have a readable pattern with a summary)."""

from __future__ import annotations

import re

from megatron_r1.recipe.candidate import Candidate
from megatron_r1.rewards.extract import ANSWER, ANY_TAG, END_ANSWER, END_THINK, THINK
from megatron_r1.rewards.format import format_reward

_LEFTOVER = re.compile(
    r"</?(?:think|answer|summary|reasoning|response|s)>|<\|[^|<>\s]{1,40}\|>|\|special_token\||"
    r"<\uff5c[^<>\s]{1,40}\uff5c>|\[/?INST\]",
    re.IGNORECASE,
)
"""Tags of formats and control tokens of chat templates."""
_BROKEN = re.compile("[\ufffd\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\uf8ff]")
"""What stands for a broken character, control characters, halves of surrogate pairs and private ones."""
_NO_LETTERS = re.compile(r"[\W_]+")
_LATIN_WORD = re.compile("[A-Za-z0-9\u00c0-\u024f]+")


def badly_formatted(candidate: Candidate, style: str) -> str:
    """Why a response does not have the format.

    think: one closed think element at the start, and a summary that is not blank after it; strict and lenient: as the
    format reward has it, with answer tags; any: a response that is not blank.
    """
    text = candidate.response
    if style in ("strict", "lenient"):
        return "" if format_reward(text, style) else f"does not have the format {style}"
    if style == "any":
        return "" if text.strip() else "is blank"
    if (text.count(THINK), text.count(END_THINK)) != (1, 1) or not text.lstrip().startswith(THINK):
        return "does not begin with one think element that is closed"
    return "" if candidate.summary else "has no summary after its reasoning"


def leftover_tags(candidate: Candidate) -> str:
    """Why a response counts as holding tags where text belongs: in its reasoning, or in its summary."""
    summary = candidate.response.rpartition(END_THINK)[2]
    if ANY_TAG.findall(summary) == [ANSWER, END_ANSWER]:  # the format of R1-Zero
        summary = ANY_TAG.sub(" ", summary)
    for name, text in (("reasoning", candidate.reasoning), ("summary", summary)):
        if found := _LEFTOVER.search(text):
            return f"its {name} holds {found[0]}"
    return ""


def unreadable(candidate: Candidate, text_share: float, longest_word: int) -> str:
    """Why a response counts as unreadable: broken characters, mostly signs, or a word without end."""
    text = candidate.response
    if broken := _BROKEN.search(text):
        return f"holds the character U+{ord(broken[0]):04X}"
    visible, letters = sum(map(len, text.split())), len(_NO_LETTERS.sub("", text))
    if letters < text_share * visible:
        return f"only {letters} of {visible} characters are letters or digits"
    longest = max(map(len, _LATIN_WORD.findall(text)), default=0)
    return f"holds a word of {longest} characters" if longest > longest_word else ""
