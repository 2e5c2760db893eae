"""Cuts a response into reasoning and summary, and extracts its answer.

Training rewards `tagged_answer`, the text inside the answer tags. `any_answer` is for the evaluation of base models: it
extracts the answer from a response in any format. `boxed_answer` extracts it from a LaTeX box, and `answer_of` chooses
by configuration. Every search is linear in the length of the response.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from megatron_r1.rewards.exact import NUMBER

THINK, END_THINK, ANSWER, END_ANSWER = TAGS = ("<think>", "</think>", "<answer>", "</answer>")
AFTER_STATEMENT = re.compile(r"(?:answer is|\u7b54\u6848\u662f|\u7b54\u6848\u4e3a)[\s:\uff1a$]*")
BOXED = "\\boxed{"
BRACES = re.compile(r"\\boxed\{|\\.|[{}]", re.DOTALL)


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

    An element that is never closed ends at the next tag or at the end of the text, so that a response that was
    truncated, or that opens the tag again instead of closing it, still has an answer.
    """
    found = []
    for part in text.split(ANSWER)[1:]:
        content = part.split(END_ANSWER, 1)[0].split("<", 1)[0].strip()
        if content:
            found.append(content)
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


def boxed_answers(text: str) -> list[str]:
    """Stripped contents of every outermost `\\boxed{...}` with balanced braces."""
    found, depth, start, inside = [], 0, 0, 0  # inside: the depth at which the box was opened, 0 outside of one
    for match in BRACES.finditer(text):
        token = match.group()
        if token.endswith("{") and token != "\\{":
            depth += 1
            if token != "{" and not inside:
                start, inside = match.end(), depth
        elif token == "}" and depth:
            if depth == inside:
                found.append(text[start : match.start()].strip())
                inside = 0
            depth -= 1
    return [content for content in found if content]


def boxed_answer(text: str) -> str | None:
    """The content of the box after the reasoning; None where there is no box, or where several boxes differ."""
    contents = set(boxed_answers(after_reasoning(text)))
    return contents.pop() if len(contents) == 1 else None


def answer_of(text: str, where: str) -> str | None:
    """The answer of a response by `where`: tags, boxed, or any (tags, then a box, then the last number)."""
    if where == "tags" or (where == "any" and ANSWER in text):
        return tagged_answer(text)
    if where == "boxed" or BOXED in after_reasoning(text):
        return boxed_answer(text)
    return any_answer(text)


def any_answer(text: str) -> str | None:
    """The answer of a response in any format, from the first of these that exists.

    The answer tags, the last `\\boxed{...}`, the number after the last "answer is", the last number in the text.
    """
    if ANSWER in text:
        return tagged_answer(text)
    if BOXED in text:
        return text.rsplit(BOXED, 1)[1].split("}", 1)[0].strip() or None
    for statement in reversed(list(AFTER_STATEMENT.finditer(text))):
        if number := NUMBER.match(text, statement.end()):
            return number.group()
    numbers = NUMBER.findall(text)
    return numbers[-1] if numbers else None
