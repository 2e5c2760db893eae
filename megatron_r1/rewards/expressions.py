"""Equality of two expressions, as a worker process decides it: brackets and lists here, algebra by math-verify.

math-verify parses LaTeX and simplifies. This module compares numbers itself: math-verify uses an absolute tolerance,
under which all small numbers are equal. Rational numbers must be equal exactly, others to a relative tolerance.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from functools import cache, lru_cache, partial
from typing import Any, NamedTuple

from megatron_r1.rewards.normalise import balanced
from megatron_r1.rewards.quantity import UNITS, parse_quantity, same_quantity, same_unit, unit_name

PLACES = 6
"""Decimals to which a decimal number stands for an irrational one from 0.1 to 10; for others as many digits in all."""
DIGITS = 60
"""Digits to which numbers that are not rational are computed, and all but 10 of which must agree."""
_DOTS = ("\\ldots", "\\dots", "\\cdots", "...")
_OPEN, _CLOSE = {"(": ")", "[": "]", "\\{": "\\}"}, (")", "]", "\\}")
_TOKEN = re.compile(r"\\begin\{[a-z*]+\}|\\end\{[a-z*]+\}|\\[{}]|\\[A-Za-z]+|[()\[\]{},;]|.", re.DOTALL)
_SEPARATORS = re.compile(
    r"(?:, ?)?(?:\\text\{ ?(?:and|or) ?\}|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z]))|\\lor(?![A-Za-z])|\\vee(?![A-Za-z])"
)
_UNIT_AT_END = re.compile(
    r"(?<=[0-9A-Za-z})!])( *\\(?:text|mathrm|textrm|mbox)\{[^{}]*\}(?:\^\{?[0-9]\}?)?| [A-Za-z]{2,}(?:\^\{?[0-9]\}?)?)$"
)
_FUNCTIONS = re.compile(r"(?<![A-Za-z\\])(sqrt|pi|infinity|infty|sin|cos|tan|ln|log)(?![A-Za-z])")
_RELATIONS = (
    ("**", "^"),
    (">=", "\\ge "),
    ("<=", "\\le "),
    ("=>", "\\ge "),
    ("=<", "\\le "),
    ("!=", "\\ne "),
    ("==", "="),
)


def equal_expressions(answer: str, truth: str) -> bool:
    """Whether two normalised texts are equal as mathematics.

    It has no time limit of its own: some answers (`10^{10^{10^{10}}}`) never come back.
    """
    (answer, unit), (truth, true_unit) = split_unit(plain_to_latex(answer)), split_unit(plain_to_latex(truth))
    return same_unit(unit, true_unit) and equal(answer, truth)


def equal(answer: str, truth: str) -> bool:
    """Whether two texts in LaTeX are equal, part by part where they are lists or in brackets."""
    answer, truth = answer.strip(), truth.strip()
    one, other = parse_quantity(answer), parse_quantity(truth)
    if one and other:
        return same_quantity(one, other)
    answer, truth = (text.replace(",", "") if found else text for text, found in ((answer, one), (truth, other)))
    if (group := bracketed(answer)) and (true_group := bracketed(truth)):
        ordered = group.kind != "\\{\\}"
        return group.kind == true_group.kind and same_parts(group.parts, true_group.parts, ordered)
    parts, true_parts = listed(answer), listed(truth)
    if len(parts) > 1 or len(true_parts) > 1:
        for each, others in ((answer, true_parts), (truth, parts)):  # a set may be written without its braces
            if (single := bracketed(each)) and len(others) > 1 and single.kind in ("\\{\\}", "()"):
                return same_parts(single.parts, others, single.kind == "()")
        return same_parts(parts, true_parts, ordered=False)
    if answer == truth in _DOTS:
        return True
    return bool(answer) and same_value(answer, truth)


class Bracketed(NamedTuple):
    """What stands in brackets."""

    kind: str
    """The two brackets."""
    parts: list[str]


def same_parts(parts: list[str], true_parts: list[str], ordered: bool) -> bool:
    """Whether all parts are equal, in this order or in some order."""
    if len(parts) != len(true_parts):
        return False
    if ordered:
        return all(equal(part, true) for part, true in zip(parts, true_parts, strict=True))
    remaining = list(true_parts)
    for part in parts:
        found = next((index for index, true in enumerate(remaining) if equal(part, true)), None)
        if found is None:
            return False
        del remaining[found]
    return True


def bracketed(text: str) -> Bracketed | None:
    """The parts of a text that is one pair of brackets with a comma inside, or a pair of curly ones."""
    tokens = _TOKEN.findall(text)
    if len(tokens) < 3 or tokens[0] not in _OPEN or tokens[-1] not in _CLOSE:
        return None
    depth = 0
    for index, token in enumerate(tokens):
        depth += (token in _OPEN or token == "{") - (token in _CLOSE or token == "}")
        if depth == 0 and index < len(tokens) - 1:
            return None
    parts = split_at_commas("".join(tokens[1:-1]))
    curly = tokens[0] == "\\{"
    return Bracketed(tokens[0] + tokens[-1], parts) if len(parts) > 1 or curly else None


def listed(text: str) -> list[str]:
    """The parts of a list without brackets; a double sign makes two."""
    parts = split_at_commas(_SEPARATORS.sub(",", text))
    if len(parts) > 1 and "=" in parts[0] and not any("=" in part for part in parts[1:]):
        parts[0] = parts[0].partition("=")[2].strip()  # x = 1, 2
    found = []
    for part in parts:
        found += [part]
        if "\\pm" in part:
            found[-1:] = [
                part.replace("\\pm", "+").replace("\\mp", "-"),
                part.replace("\\pm", "-").replace("\\mp", "+"),
            ]
    return [part.strip().removeprefix("+").strip() for part in found]


def split_at_commas(text: str) -> list[str]:
    """The text cut at commas and semicolons that are in no brackets of any kind."""
    parts, depth = [""], 0
    for token in _TOKEN.findall(text):
        depth += (token in _OPEN or token == "{" or token.startswith("\\begin")) - (
            token in _CLOSE or token == "}" or token.startswith("\\end{")
        )
        if token in ",;" and depth == 0:
            parts.append("")
        else:
            parts[-1] += token
    return [part.strip() for part in parts]


def split_unit(text: str) -> tuple[str, str]:
    """An expression and the name of the unit at its end; an empty one where there is none."""
    match = _UNIT_AT_END.search(text)
    if match is None:
        return text, ""
    words = re.sub(r"\\[a-z]+\{([^{}]*)\}", r" \1", match[1])
    name = unit_name(" " + " ".join(words.split()))
    known = name is not None and (match[1].lstrip().startswith("\\") or name.rstrip("23") in UNITS.values())
    return (text[: match.start(1)].strip(), name or "") if known else (text, "")


def plain_to_latex(text: str) -> str:
    """Plain-text mathematics as LaTeX: sqrt(2), x^(1/2), 2*pi, >=."""
    for plain, latex in _RELATIONS:
        text = text.replace(plain, latex)
    text = _FUNCTIONS.sub(lambda match: "\\infty " if match[1] == "infinity" else f"\\{match[1]} ", text)
    text = re.sub(r"(?<=[0-9]) (?=[a-z](?![A-Za-z]))", "", text)  # math-verify takes a single i for another than in 2i
    text = re.sub(r"(?<=[0-9A-Za-z)}]) ?\* ?(?=[0-9A-Za-z(\\{])", r" \\cdot ", text)
    for command in ("\\sqrt", "^"):
        text = _braced_arguments(text, command)
    return re.sub(r"\^ ?(-[0-9A-Za-z]+|[0-9]{2,})", r"^{\1}", text)


def _braced_arguments(text: str, command: str) -> str:
    """`command(...)` with braces, up to the parenthesis that closes it."""
    pieces = re.split(rf"({re.escape(command)} ?)(?=\()", text, maxsplit=20)
    for index in range(len(pieces) - 2, 0, -2):
        rest = "".join(pieces[index + 1 :])
        depth = 0
        for end, sign in enumerate(rest):
            depth += (sign == "(") - (sign == ")")
            if depth == 0:
                pieces[index:] = [f"{command}{{{rest[1:end]}}}{rest[end + 1 :]}"]
                break
    return "".join(pieces)


@cache
def _library() -> tuple[Any, Any]:
    """math-verify's parser and its comparison, with our own equality of numbers."""
    from math_verify import LatexExtractionConfig, grader, parse

    grader.sympy_numeric_eq = same_numbers
    grader.sympy_symbolic_eq = partial(_same_symbolically, grader.sympy_symbolic_eq)
    normalisation = LatexExtractionConfig().normalization_config
    config = LatexExtractionConfig(
        boxed_match_priority=0,
        try_extract_without_anchor=False,
        # Units are split off before: math-verify would take letters at an end for units, as in 2t.
        normalization_config=type(normalisation)(
            basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all", equations=False
        ),
    )
    return partial(parse, extraction_config=[config], parsing_timeout=None), partial(
        grader.verify, timeout_seconds=None, allow_set_relation_comp=True
    )


@lru_cache(256)
def parsed(text: str) -> tuple[Any, ...]:
    """The forms in which math-verify reads an expression: of sympy, with decimals as fractions, and as text."""
    parse, _ = _library()
    return tuple(map(exact, parse(f"\\boxed{{{text}}}")))


def same_value(answer: str, truth: str) -> bool:
    """Whether math-verify finds two expressions without commas equal."""
    _, verify = _library()
    if not balanced(answer) or "\\boxed" in answer:
        return False
    sides, true_sides = re.split(r"(?<![<>!\\])=", answer), re.split(r"(?<![<>!\\])=", truth)
    if len(sides) > 1 and len(true_sides) == 1:
        answer = value_of_equation(sides)
    elif len(true_sides) > 1 and len(sides) == 1:
        truth = value_of_equation(true_sides)
    if not answer or not truth:
        return False
    return bool(verify(list(parsed(truth)), list(parsed(answer))))


def value_of_equation(sides: list[str]) -> str:
    """The value that an equation gives to its left side; empty where its sides contradict each other or name none.

    The left side may be a name (x, f(2), the area) or a calculation, which must have this value.
    """
    _, verify = _library()
    *others, value = (side.strip() for side in sides)
    for index, side in enumerate(others):
        found = [one for one in parsed(side) if not isinstance(one, str)]
        number = bool(found) and getattr(found[0], "is_number", False)
        if number and not verify(list(parsed(value)), list(parsed(side))):
            return ""
        if (
            not number
            and index == 0
            and re.search(r"[A-Za-z0-9})] *[-+*/]|^-", side)
            and not re.search(r"\\text|[a-z]{4}", side)
        ):
            return ""
    return value


def exact(expression: Any) -> Any:
    """The expression with its decimals as fractions."""
    from sympy import Basic, Float, Rational

    if not isinstance(expression, Basic) or not (decimals := expression.atoms(Float)):
        return expression
    return expression.xreplace({decimal: Rational(str(decimal)) for decimal in decimals})


def _same_symbolically(simplifies: Callable[[Any, Any], bool], one: Any, other: Any) -> bool:
    """As math-verify, which simplifies for long, but for two numbers: `same_numbers` has decided on them."""
    decided = all(getattr(each, "is_number", False) and each.is_zero is False for each in (one, other))
    return not decided and simplifies(one, other)


def same_numbers(one: Any, other: Any, *_: object) -> bool:
    """Whether two numbers, or matrices of them, are equal; in the place of math-verify's own function."""
    from sympy import Float, MatrixBase, N

    if isinstance(one, MatrixBase) and isinstance(other, MatrixBase):
        return one.shape == other.shape and all(map(same_numbers, one.flat(), other.flat()))
    one, other = (exact(each.doit()) for each in (one, other))
    if not (one.is_number and other.is_number):
        return False
    if one.is_Rational and other.is_Rational:
        return bool(one == other)
    rational, irrational = (one, other) if one.is_Rational else (other, one)
    if rational.is_Rational and is_decimal(rational):
        value = N(irrational, DIGITS)
        return bool(value.is_real and value) and same_rounded(Fraction(str(rational)), Fraction(str(value)))
    if not (one.is_finite and other.is_finite):
        return bool(one == other)
    difference, size = abs(N(one - other, DIGITS)), max(abs(N(one, DIGITS)), abs(N(other, DIGITS)))
    return bool(difference <= Float(10) ** (10 - DIGITS) * size)


def same_rounded(decimal: Fraction, value: Fraction) -> bool:
    """Whether a decimal stands for a value: both are equal when rounded to `PLACES`."""
    exponent = len(str(abs(value.numerator))) - len(str(value.denominator))
    exponent -= abs(value) < Fraction(10) ** exponent
    places = PLACES - (0 if exponent == -1 else exponent)
    return round(decimal, places) == round(value, places)


def is_decimal(value: Any) -> bool:
    """Whether a fraction is a decimal that ends, or an integer that may be a rounded one."""
    rest = int(value.q)
    for factor in (2, 5):
        while rest % factor == 0:
            rest //= factor
    return rest == 1 and (value.q > 1 or value.p % 10 == 0)
