"""Brings an answer and the truth to one form before they are compared: characters, spaces, markdown, wrappers.

What only looks different becomes equal here; values (a percentage, a unit, a power of ten) are `quantity`'s.
"""

from __future__ import annotations

import re
import unicodedata

INVISIBLE = dict.fromkeys(map(ord, "\u00ad\u200b\u200c\u200d\u200e\u200f\u2060\u2061\u2062\u2063\ufe0e\ufe0f\ufeff"))
_FRACTIONS = {
    "\u00bd": "1/2", "\u2153": "1/3", "\u2154": "2/3", "\u00bc": "1/4", "\u00be": "3/4", "\u2155": "1/5",
    "\u2156": "2/5", "\u2157": "3/5", "\u2158": "4/5", "\u2159": "1/6", "\u215a": "5/6", "\u2150": "1/7",
    "\u215b": "1/8", "\u215c": "3/8", "\u215d": "5/8", "\u215e": "7/8", "\u2151": "1/9", "\u2152": "1/10",
}  # fmt: skip
_SIGNS = {
    "\u2212": "-", "\u2013": "-", "\u2012": "-", "\u2010": "-", "\u2011": "-", "\ufe63": "-", "\u2044": "/",
    "\u00d7": "\\times ", "\u00b7": "\\cdot ", "\u22c5": "\\cdot ", "\u2219": "\\cdot ", "\u00f7": "/",
    "\u2236": ":", "\ua789": ":", "\u00b0": "^\\circ ", "\u00ba": "^\\circ ", "\u2103": "^\\circ C",
    "\u2109": "^\\circ F", "\u03c0": "\\pi ", "\u221e": "\\infty ", "\u2264": "\\le ", "\u2a7d": "\\le ",
    "\u2265": "\\ge ", "\u2a7e": "\\ge ", "\u2260": "\\ne ", "\u00b1": "\\pm ", "\u2213": "\\mp ", "\u222a": "\\cup ",
    "\u2229": "\\cap ", "\u2208": "\\in ", "\u2205": "\\emptyset ", "\u03b8": "\\theta ", "\u03b1": "\\alpha ",
    "\u03b2": "\\beta ", "\u03b3": "\\gamma ", "\u03bb": "\\lambda ", "\u03c6": "\\phi ", "\u211d": "\\mathbb{R}",
    "\u2124": "\\mathbb{Z}", "\u2248": "\\approx ", "\u3002": ".",
}  # fmt: skip
_TABLE = str.maketrans({sign: f"\\frac{{{value.replace('/', '}{')}}}" for sign, value in _FRACTIONS.items()} | _SIGNS)
_RAISED = str.maketrans(
    "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207a\u207b\u207f", "0123456789+-n"
)
_LOWERED = str.maketrans("\u2080\u2081\u2082\u2083\u2084\u2085\u2086\u2087\u2088\u2089", "0123456789")
_SCRIPTS = re.compile("[\u2070\u00b9\u00b2\u00b3\u2074-\u2079\u207a\u207b\u207f]+|[\u2080-\u2089]+")
_ROOT = re.compile("(\u221a|\u221b) *(?:([0-9.]+|[A-Za-z]|\\\\pi)|(?=[({]))")
_LATEX_SPACE = re.compile(r"\\[,;:> ]|\\(?:quad|qquad|thinspace|medspace|displaystyle|textstyle)(?![A-Za-z])|~|[^\S\n]")
_NOTHING = re.compile(r"\\!|\\(?:left|right|bigl?|bigr|Bigl?|Bigr)(?![A-Za-z])\.?|\\(?:limits|nolimits)(?![A-Za-z])")
_MARKDOWN = re.compile(r"(\*{1,3}|_{2,3}|`{1,3})(?=\S)(.+?)(?<=\S)\1", re.DOTALL)
_WRAPPED = (
    ("\\boxed{", "}"), ("\\fbox{", "}"), ("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"), ("\"", "\""),
    ("\u201c", "\u201d"),
)  # fmt: skip
BRACES = re.compile(r"\\.|[{}]", re.DOTALL)


def normalised(text: str) -> str:
    """The text in the one form in which answers are compared; linear in its length, but for nested wrappers."""
    text = text.translate(INVISIBLE)
    text = _SCRIPTS.sub(_script, text).translate(_TABLE)
    text = unicodedata.normalize("NFKC", _ROOT.sub(_root, text))
    text = _LATEX_SPACE.sub(" ", _NOTHING.sub("", text)).replace("{,}", ",")
    text = re.sub(r"\\[dtc]frac(?![A-Za-z])", r"\\frac", text)
    return unwrapped(re.sub(r" {2,}", " ", text))


def unwrapped(text: str) -> str:
    """The text without a box, dollar signs, quotes or markdown around all of it, and without a final full stop."""
    while (inner := _one_less(text.strip())) != text:
        text = inner
    return text


def _one_less(text: str) -> str:
    marked = _MARKDOWN.fullmatch(text)
    if marked and marked[1][0] not in marked[2]:
        return marked[2]
    for before, after in _WRAPPED:
        inner = text[len(before) : -len(after)]
        wraps = len(text) > len(before) + len(after) and text.startswith(before) and text.endswith(after)
        if (wraps and balanced(inner) and before[-1] not in '$"') or (wraps and before[-1] not in inner):
            return inner
    return re.sub(r"(?<!\.)\.$", "", text)


def balanced(text: str) -> bool:
    """Whether all braces are paired, so that the answer stays inside the expression into which it is inserted."""
    depth = 0
    for token in BRACES.findall(text):
        depth += (token == "{") - (token == "}")
        if depth < 0:
            return False
    return depth == 0


def _script(match: re.Match[str]) -> str:
    raised, lowered = match[0].translate(_RAISED), match[0].translate(_LOWERED)
    return f"^{{{raised}}}" if raised != match[0] else f"_{{{lowered}}}"


def _root(match: re.Match[str]) -> str:
    command = "\\sqrt" if match[1] == "\u221a" else "\\sqrt[3]"
    return f"{command}{{{match[2]}}}" if match[2] else command
