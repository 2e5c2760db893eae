"""Answers at the end of worked solutions, as data sets publish them: in LaTeX boxes, or after `####`."""

from __future__ import annotations

import re

MARK = "####"
"""What GSM8K puts before the answer of a solution."""
_BOX = re.compile(r"\\f?box(?:ed)?\s*\{|\\boxed\s+[^\s{}\\.,;:$]+|\\.|[{}]", re.DOTALL)


def boxed_answers(text: str) -> list[str]:
    """Stripped contents of every outermost `\\boxed{...}` or `\\fbox{...}` with balanced braces, and of `\\boxed 5`."""
    found, depth, start, inside = [], 0, 0, 0  # inside: the depth at which the box was opened, 0 outside of one
    for match in _BOX.finditer(text):
        token = match.group()
        if token.endswith("{") and token != "\\{":
            depth += 1
            if token != "{" and not inside:
                start, inside = match.end(), depth
        elif token.startswith("\\boxed"):
            found += [] if inside else [token.removeprefix("\\boxed")]
        elif token == "}" and depth:
            if depth == inside:
                found.append(text[start : match.start()])
                inside = 0
            depth -= 1
    return [content.strip() for content in found if content.strip()]


def marked_answer(text: str) -> str | None:
    """The line after the last `####` that begins a line; None where there is none."""
    if MARK not in text:
        return None
    _, mark, after = f"\n{text}".rpartition(f"\n{MARK}")
    line = after.strip().partition("\n")[0].strip() if mark and not after.startswith("#") else ""
    return line or None
