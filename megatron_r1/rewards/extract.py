"""Cuts a response into reasoning and summary, and extracts its answer.

`answer_of` is the one extraction of training, sampling and evaluation: from the answer tags, from a LaTeX box, or from
a response in any format. It never cuts an answer: an element ends at the next tag, a box at its closing brace, an
expression at its end. Every search is linear in the length of the response.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from megatron_r1.data.prompts.worked import boxed_answers
from megatron_r1.rewards.last_value import last_value

THINK, END_THINK, ANSWER, END_ANSWER = TAGS = ("<think>", "</think>", "<answer>", "</answer>")
ANY_TAG = re.compile("|".join(TAGS))


class Parts(NamedTuple):
    """The two parts of a response."""

    reasoning: str
    summary: str


def split_reasoning(response: str) -> Parts:
    """Cut a response at the last closing think tag; white space and answer tags are kept.

    Where the reasoning is never closed, the summary is empty. A response without think tags is all summary.
    """
    reasoning, closed, summary = response.rpartition(END_THINK)
    if closed:
        return Parts(reasoning.replace(THINK, "", 1), summary)
    before, opened, reasoning = response.partition(THINK)
    return Parts(before + reasoning, "") if opened else Parts("", response)


def after_reasoning(response: str) -> str:
    """The text after the last closing think tag; the whole response where there is none."""
    return response.rpartition(END_THINK)[2]


def first_thought(response: str) -> tuple[int, int] | None:
    """Start and end of the text from the first opening think tag to the next closing one or the end of the response."""
    start = response.find(THINK)
    if start < 0:
        return None
    start += len(THINK)
    end = response.find(END_THINK, start)
    return start, len(response) if end < 0 else end


def answer_elements(text: str) -> list[str]:
    """Stripped contents of every answer element, in order.

    An element ends at the next of `TAGS` or at the end of the text, so that a response that was truncated, or that
    opens the tag again instead of closing it, still has an answer. No other less-than sign ends it.
    """
    found = []
    for part in text.split(ANSWER)[1:]:
        content = part.split(END_ANSWER, 1)[0]
        if "<" in content:
            content = ANY_TAG.split(content, 1)[0]
        found += [content.strip()] if content.strip() else []
    return found


def tagged_answer(text: str) -> str | None:
    """The text inside the answer tags; None where there are no tags, or where several elements differ.

    A response with several different answers gets no credit: rewarding one of them would reward guessing.
    """
    contents = set(answer_elements(text))
    return contents.pop() if len(contents) == 1 else None


def last_tagged(text: str) -> str | None:
    """The text after the last opening answer tag, up to the closing one; None without an opening tag."""
    _, opened, inside = text.rpartition(ANSWER)
    return inside.partition(END_ANSWER)[0] if opened else None


def boxed_answer(text: str) -> str | None:
    """The content of the box after the reasoning; None where there is no box, or where several boxes differ."""
    contents = set(boxed_answers(after_reasoning(text)))
    return contents.pop() if len(contents) == 1 else None


def any_answer(text: str) -> str | None:
    """The answer of a response in any format, from the first of these that exists.

    The answer tags, the last box after the reasoning, what the last "answer is" states, the last value in the text.
    """
    if ANSWER in text:
        return tagged_answer(text)
    rest = after_reasoning(text)
    boxes = boxed_answers(rest)
    return boxes[-1] if boxes else last_value(rest if rest.strip() else text)


ANSWERS = {"tags": tagged_answer, "boxed": boxed_answer, "any": any_answer}
"""Value of `reward.answer_format` -> where the answer is looked for."""


def answer_of(text: str, where: str) -> str | None:
    """The answer of a response by `where`: tags, boxed, or any (tags, a box, a statement, the last value)."""
    return ANSWERS[where](text)
