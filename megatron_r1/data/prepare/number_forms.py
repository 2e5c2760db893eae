"""One spelling for every number of a text, so that texts are compared whatever the format of their numbers.

`1,000`, `1 000`, `1_000`, full-width digits, `one thousand`, `1 thousand` and the Chinese number words become `1000`;
`3.50` becomes `3.5`, `50 percent` `50`. What is read wrongly (a year in words, a "one" that counts nothing) is read so
in every text, so that equal texts stay equal.
"""

from __future__ import annotations

import re
import unicodedata

_DIGITS = {name: value for value, name in enumerate(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen".split())}  # fmt: skip
_TENS = {name: 10 * value for value, name in enumerate(
    "twenty thirty forty fifty sixty seventy eighty ninety".split(), 2)}  # fmt: skip
_SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9}
_SMALL = rf"(?:(?:{'|'.join(_TENS)})(?:[- ](?:{'|'.join(list(_DIGITS)[1:10])}))?|{'|'.join(reversed(_DIGITS))})"
_BELOW_1000 = rf"(?:(?:{_SMALL}|a) hundred(?:(?: and)? {_SMALL})?|{_SMALL})"
_ENGLISH = re.compile(
    r"(?<![a-z])(?=[aefnostz])"  # number words begin with these
    rf"(?:(?:{_BELOW_1000}|a)(?: (?:{'|'.join(_SCALES)})(?:,? (?:and )?{_BELOW_1000})?)+|{_BELOW_1000})(?![a-z])"
)
_SCALED = re.compile(rf"(?<![\d.])(\d+(?:\.\d+)?) ?({'|'.join(_SCALES)}|[\u767e\u5343\u4e07\u4ebf])(?![a-z])")
_CHINESE_DIGITS = {sign: value for value, sign in enumerate(
    "\u96f6\u4e00\u4e8c\u4e09\u56db\u4e94\u516d\u4e03\u516b\u4e5d")} | {"\u3007": 0, "\u4e24": 2}  # fmt: skip
_CHINESE_UNITS = {"\u5341": 10, "\u767e": 100, "\u5343": 1000}
_CHINESE_SCALES = {"\u4e07": 10**4, "\u4ebf": 10**8}
_CHINESE = re.compile(f"[{''.join(_CHINESE_DIGITS | _CHINESE_UNITS | _CHINESE_SCALES)}]+")
_GROUPED = re.compile(r"(?<![\d.])\d{1,3}(?:(?:,|\{,\}|\\,|'|_|[ \u00a0\u2009\u202f])\d{3})+(?![\d])")
_ZEROS = re.compile(r"(?<![\d.])(\d+)\.(\d*?)0*(?![\d.]*\d)")
_PERCENT = re.compile(r"(?<=\d) ?(?:per ?cent|pct)(?![a-z])")
_CHINESE_PERCENT = re.compile("\u767e\u5206\u4e4b")
_RAISED = re.compile("([\u2070\u00b9\u00b2\u00b3\u2074-\u2079]+)")


def plain_numbers(text: str) -> str:
    """The text in small letters, with every number in digits; linear in its length."""
    text = unicodedata.normalize("NFKC", _RAISED.sub(r" ^ \1", text)).casefold()
    text = re.sub(r"[^\S\n]+", " ", text)
    text = _GROUPED.sub(lambda found: re.sub(r"\D", "", found[0]), _CHINESE_PERCENT.sub("", text))
    text = _ENGLISH.sub(_english_value, text)
    text = _CHINESE.sub(_chinese_value, _SCALED.sub(_scaled_value, text))
    return _PERCENT.sub("", _ZEROS.sub(_without_zeros, text))


def _without_zeros(found: re.Match[str]) -> str:
    return f"{found[1]}.{found[2]}" if found[2] else found[1]


def _scaled_value(found: re.Match[str]) -> str:
    scale = (_SCALES | _CHINESE_UNITS | _CHINESE_SCALES)[found[2]]
    whole, _, part = found[1].partition(".")
    return str(int(whole + part) * scale // 10 ** len(part))


def _english_value(found: re.Match[str]) -> str:
    total, current = 0, 0
    for word in re.findall(r"[a-z]+", found[0]):
        if word == "hundred":
            current = max(current, 1) * 100
        elif word in _SCALES:
            total, current = total + max(current, 1) * _SCALES[word], 0
        else:
            current += _DIGITS.get(word, 0) or _TENS.get(word, 0)
    return str(total + current)


def _chinese_value(found: re.Match[str]) -> str:
    """The value of a Chinese number word; digits alone are read one by one, as in a year."""
    text = found[0]
    if all(sign in _CHINESE_DIGITS for sign in text):
        return "".join(str(_CHINESE_DIGITS[sign]) for sign in text)
    total, section, digit = 0, 0, 0
    for sign in text:
        if sign in _CHINESE_DIGITS:
            digit = _CHINESE_DIGITS[sign]
        elif sign in _CHINESE_UNITS:
            section, digit = section + (digit or 1) * _CHINESE_UNITS[sign], 0
        else:
            total, section, digit = (total + section + digit or 1) * _CHINESE_SCALES[sign], 0, 0
    return str(total + section + digit)
