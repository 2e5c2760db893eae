"""The answer of a response without tags and boxes: what its last statement of an answer says, or its last value.

`last_value` returns a number with its sign, fraction, exponent and unit. It skips digits inside something larger: a
name, a time of day, a term of a sum.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from megatron_r1.data.prompts.worked import marked_answer

MAX_CLAUSE = 400
"""Characters after a statement in which its answer must end."""
MAX_STATEMENTS = 50
"""Statements that are read, from the last; more than that are no answer but a loop."""
ANNOUNCING = ("nswer", "NSWER", "esult", "ESULT", "\u7b54\u6848")
"""Parts of the words with which statements begin."""
STATEMENT = re.compile(
    r"(?:(?:answer|result)(?:\s+is|\s*(?:=|:|\uff1a))|\u7b54\u6848(?:\u662f|\u4e3a|\u5e94\u4e3a|[:\uff1a]))"
    r"(?:\s{0,3}(?:equal to|[:\uff1a]))?[\s*_]{0,9}",
    re.IGNORECASE,
)
_BEFORE = r"(?<![0-9A-Za-z_.^{\\/])(?<![0-9][:,])(?<![0-9A-Za-z)}][-+*/\u2212])(?<![0-9A-Za-z)}] [-+*/\u2212\u00d7] )"
_SIGN = r"(?:(?<![0-9A-Za-z)}])(?<![0-9A-Za-z)}] )[-+\u2212])?"
_CURRENCY = r"(?:(?:US)?\\?\$|[\u20ac\u00a3\u00a5] ?)?[-\u2212]?"
_NUMBER = r"[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?"
_REST = (
    r"(?: [0-9]+/[0-9]+|/[0-9]+|[eE][-+]?[0-9]+|(?: ?(?:\\times|\\cdot|\u00d7|\*) ?10)?\^(?:\{-?[0-9]+\}|-?[0-9]+))?"
    r"(?: ?\\?%|\u00b0|[ckm]?m|[km]?g|ml|km/h|mph|[ap]m)?"
)
_AFTER = r"(?![0-9A-Za-z_^/{]|[.,:][0-9]| ?[-+*/\u2212\u00d7] ?[0-9A-Za-z(\\])"
_LATEX = r"-?[0-9]*\\[dt]?frac ?\{[^{}]{1,40}\} ?\{[^{}]{1,40}\}|-?[0-9]*\\sqrt ?\{[^{}]{1,40}\}"
VALUE = re.compile(rf"{_BEFORE}{_SIGN}(?:{_LATEX}|{_CURRENCY}{_NUMBER}{_REST}){_AFTER}")
_MATH_SIGN = re.compile(r"\\[()\[\]]|\$\$|(?<!\\)\$|\n\n")
_CLOSING = {"\\(": "\\)", "\\[": "\\]", "$$": "$$", "$": "$"}
_CLAUSE_END = re.compile(r"[.!?;\uff1b](?=\s|$)|\n|\u3002|[,\uff0c](?=\s)|\uff0c|[()\[\]{}]")
_EXPRESSION = re.compile(r"[-+\u2212(\[\\$\u221a\u00b1\u20ac\u00a3]|[0-9]|[A-Za-z](?![A-Za-z])|\u03c0")
_FUNCTIONS = re.compile(r"\\[A-Za-z]+|\b(?:sqrt|pi|sin|cos|tan|log|ln|or|and)\b")


class Formula(NamedTuple):
    """A formula between its signs."""

    start: int
    end: int
    text: str


def last_value(text: str) -> str | None:
    """The stated answer, or the last value; None where there is neither.

    After the words that announce an answer an expression counts up to the end of its clause, and a number with other
    words around it only as the number.
    """
    if marked := marked_answer(text):
        return marked
    announced = any(word in text for word in ANNOUNCING)
    for statement in reversed(list(STATEMENT.finditer(text))[-MAX_STATEMENTS:] if announced else []):
        if (stated := _stated(text[statement.end() : statement.end() + MAX_CLAUSE])) is not None:
            return stated
    spans = list(formulas(text)) if "$" in text or "\\" in text else []
    pieces, end = [], 0
    for span in spans:
        pieces += [text[end : span.start], " " * (span.end - span.start)]
        end = span.end
    outside = _last_match("".join([*pieces, text[end:]]))
    if spans and (outside is None or spans[-1].start > outside.start()):
        return right_side(spans[-1].text) or None
    return outside[0].strip() if outside else None


def _last_match(text: str) -> re.Match[str] | None:
    """The last value, looked for from the last line on."""
    end = len(text)
    while end >= 0:
        start = text.rfind("\n", 0, end) + 1
        if found := list(VALUE.finditer(text, start, end)):
            return found[-1]
        end = start - 1
    return None


def right_side(formula: str) -> str:
    """The last side of an equation, the whole of another formula."""
    return re.split(r"(?<![<>!\\])=|\\implies|\\Rightarrow", formula)[-1].strip(" .,")


def formulas(text: str) -> Iterator[Formula]:
    """The formulas between `$`, `$$`, `\\(` and `\\[`; a dollar sign before a price opens none."""
    opened: re.Match[str] | None = None
    for sign in _MATH_SIGN.finditer(text):
        if opened and sign[0] == _CLOSING[opened[0]]:
            inside = text[opened.end() : sign.start()]
            price = sign[0] == "$" and (inside[-1:].isspace() or text[sign.end() : sign.end() + 1].isdigit())
            if inside.strip() and not price:
                yield Formula(opened.start(), sign.end(), inside.strip())
            opened = sign if price else None
        elif sign[0] in _CLOSING:
            opened = sign
        elif sign[0] == "\n\n":  # no formula has an empty line
            opened = None


def _stated(text: str) -> str | None:
    """What stands at the start of the text after a statement: a formula, an expression, or a number before words."""
    if (first := next(formulas(text), None)) and first.start == 0:
        return first.text.strip(" .,")
    clause = text[: _end_of_clause(text)].strip(" *_`")
    if not _EXPRESSION.match(clause):
        return None
    if not re.search(r"[A-Za-z]{2,}", _FUNCTIONS.sub("", clause)):
        return clause
    value = VALUE.match(clause)
    return value[0].strip() if value else None


def _end_of_clause(text: str) -> int:
    depth = 0
    for sign in _CLAUSE_END.finditer(text):
        if sign[0] in "([{":
            depth += 1
        elif sign[0] in ")]}":
            depth -= 1
        elif depth <= 0 or sign[0] == "\n":
            return sign.start()
    return len(text)
