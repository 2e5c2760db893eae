"""Finds the program of a response among its code blocks: examples of input, of output and of calls are none."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from megatron_r1.rewards.extract import ANSWER, END_ANSWER, after_reasoning

LONGEST_PROGRAM = 1 << 18
TAGS = {
    "python": ("python", "python3", "py", "py3", "pypy", "pypy3", "python3.12"),
    "cpp": ("cpp", "c++", "cxx", "cc", "c++17", "c++20", "cpp17", "cpp20", "g++"),
}
"""Language -> how the fence of a code block may name it."""
_FENCE = re.compile(r"(?P<indent>[ \t>]*)(?:(?:[0-9]+\.|[-*]) +)?(?P<fence>`{3,}|~{3,}) *(?P<info>[^\n]*)")
_TAG_AT_FENCE = re.compile(r"(?<=```) *</answer>|<answer> *(?=```)")
_INLINE = re.compile(r"[ \t]*```(?P<code>[^`\n]+)```[ \t]*")


class Block(NamedTuple):
    """A fenced code block."""

    tag: str
    """Language that its fence names, in lower case; empty for none."""
    code: str


def find_program(text: str, language: str = "", entry_point: str = "") -> str | None:
    """The program of a response, from its answer element, or, without one, from the text after the reasoning.

    Blocks in the language go before blocks without one, and these before others; among them those that define
    `entry_point`, and among these the longest. Without a code block it is the whole answer element.
    """
    part = after_reasoning(text.replace("\r\n", "\n"))
    tagged = None
    if ANSWER in part:
        inside = part[part.index(ANSWER) + len(ANSWER) :]
        end = inside.rfind(END_ANSWER)  # the last one: a program may print one
        tagged = inside if end < 0 else inside[:end]
        part = _TAG_AT_FENCE.sub("\n", tagged)
    found = [block for block in code_blocks(part) if block.code.strip()]
    if entry_point:
        found = [block for block in found if defines(block.code, entry_point)] or found
    chosen = (
        [block.code for block in found if block.tag in TAGS.get(language, sum(TAGS.values(), ()))]
        or [block.code for block in found if not block.tag]
        or [block.code for block in found]
    )
    program = max(reversed(chosen), key=len) if chosen else None if any(code_blocks(part)) else tagged
    return program if program and program.strip() and len(program) <= LONGEST_PROGRAM else None


def defines(code: str, name: str) -> bool:
    """Whether Python code has a function, class or variable of this name at its top level."""
    word = re.escape(name)
    return bool(re.search(rf"^(?:(?:async +)?def|class) +{word}\b|^{word} *(?::[^=\n]*)?=(?!=)", code, re.M))


def code_blocks(text: str) -> Iterator[Block]:
    """Every fenced block; one that is never closed ends with the text."""
    opened: re.Match[str] | None = None
    lines: list[str] = []
    for line in text.split("\n"):
        fence = _FENCE.fullmatch(line)
        if opened is None:
            if inline := _INLINE.fullmatch(line):
                yield Block("", inline["code"])
            elif fence and "`" not in fence["info"]:
                opened, lines = fence, []
        elif fence and fence["fence"].startswith(opened["fence"]) and not fence["info"].strip():
            yield _block(opened, lines)
            opened = None
        else:
            lines.append(line)
    if opened is not None and lines:
        yield _block(opened, lines)


def _block(fence: re.Match[str], lines: list[str]) -> Block:
    """The lines of a block without the indentation of its fence."""
    width = len(fence["indent"].expandtabs())
    code = "".join(f"{_without_indent(line, width)}\n" for line in lines)
    tag = re.match(r"\{?\.?([^\s{},:]*)", fence["info"])
    return Block(tag[1].lower() if tag else "", code)


def _without_indent(line: str, width: int) -> str:
    spaces = len(line) - len(line.lstrip(" \t>"))
    return line[:spaces].expandtabs()[width:] + line[spaces:] if width else line
