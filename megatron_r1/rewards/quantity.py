"""Numbers as answers: exact values with units, percentages, currencies, powers of ten, in any usual spelling.

A unit counts as wrong only where the truth has another one. A percentage equals the number before its sign and a
hundredth of it, unless both are percentages.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

MAX_NUMBER_CHARACTERS = 200
"""Longer answers are no numbers, which bounds the time for one."""
MAX_EXPONENT = 1000
TEXT_COMMAND = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|operatorname)\{([^{}\\]*)\}")
_INTEGER = r"(?:[0-9]+(?:,[0-9]{3})+|[0-9]{1,3}(?: [0-9]{3})+|[0-9]+)"
_DECIMAL = rf"(?:{_INTEGER}(?:\.[0-9]*)?|\.[0-9]+)"
_BRACED = r"\{? *(-?[0-9]+) *\}?"
_POWER = rf"(?: ?(?:\\times|\\cdot|\*|x) ?10 ?\^ ?{_BRACED}|[eE]([-+]?[0-9]+))"
NUMBER = re.compile(
    rf"(?P<sign>[-+]?) ?(?:"
    rf"(?P<whole>{_INTEGER})"
    rf"(?: ?\\frac ?(?P<pair>\{{ ?[0-9]+ ?\}} ?\{{ ?[0-9]+ ?\}}|[0-9] ?[0-9])| (?P<part>[0-9]+ ?/ ?[0-9]+))"
    rf"|\\frac ?(?P<fraction>\{{ ?-?[0-9]+ ?\}} ?\{{ ?[0-9]+ ?\}}|[0-9] ?[0-9])"
    rf"|(?P<start>[0-9]*\.[0-9]*)(?:\\overline|\\dot|\\bar) ?\{{?(?P<period>[0-9]+)\}}?"
    rf"|10 ?\^ ?(?:\{{ *(?P<ten>-?[0-9]+) *\}}|(?P<bare>-?[0-9]+))"
    rf"|(?P<decimal>{_DECIMAL})(?:(?P<power>{_POWER})| ?/ ?(?P<divisor>{_INTEGER})|_\{{?(?P<base>[0-9]{{1,2}})\}}?)?"
    rf")"
)
CURRENCY = re.compile(r"(?:US|HK|A|C)?\\?\$|[\u20ac\u00a3\u00a5\u20b9]|(?:USD|EUR|GBP|CNY|Rs\.?)(?= ?[0-9.])")
_WORDS = r"[^\W\d_]+(?:['\u2019.-][^\W\d_]+)*"
UNIT = re.compile(
    rf"(?: ?(?P<percent>\\?%)| ?\^ ?\{{?\\circ\}}? ?(?P<degrees>[CF]?)"
    rf"|(?P<words> ?{_WORDS}\.?(?:\^?\{{?-?[0-9]\}}?)?(?:[ /]+{_WORDS}\.?(?:\^?\{{?-?[0-9]\}}?)?){{0,4}}))\.?"
)
NO_UNITS = re.compile(
    r"\b(?:or|and|not|no|to|by|is|are|if|than|times|plus|minus|true|false|over|divided|power|e|i|x|y|z|n|pi|sqrt|sin|"
    r"cos|tan|cot|log|ln|exp|mod|choose|factorial|unknown|half|halves|thirds?|fourths?|fifths?|sixths?|sevenths?|"
    r"eighths?|ninths?|tenths?|hundredths?|thousandths?|dozens?|squared|cubed)\b",
    re.IGNORECASE,
)
SCALES = {
    "hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "\u4e07": 10**4,
    "\u4ebf": 10**8,
}  # fmt: skip
_NAMES = {
    "%": "percent|per cent|pct", "degree": "deg", "m": "meter|metre", "cm": "centimeter|centimetre",
    "mm": "millimeter|millimetre", "km": "kilometer|kilometre", "inch": "inches|in", "foot": "feet|ft",
    "yard": "yd", "mile": "mi", "g": "gram|gramme", "kg": "kilogram|kilo", "mg": "milligram", "pound": "lb",
    "ounce": "oz", "s": "second|sec", "minute": "min", "h": "hour|hr", "day": "", "week": "", "month": "",
    "year": "yr", "liter": "litre|l", "ml": "milliliter|millilitre", "dollar": "$|\\$|us$|us\\$|usd", "cent": "",
    "euro": "\u20ac|eur", "gbp": "\u00a3", "cny": "\u00a5|yuan|rmb|\u5143", "inr": "\u20b9|rs|rupee", "unit": "",
    "mph": "miles per hour", "km/h": "kph|kmh|kmph|kilometers per hour|km per hour", "kw": "", "kwh": "", "hz": "",
    "am": "a.m", "pm": "p.m", "c": "celsius", "f": "fahrenheit", "point": "pt", "hectare": "ha", "acre": "",
}  # fmt: skip
UNITS = {other: name for name, others in _NAMES.items() for other in (name, *filter(None, others.split("|")))}
"""Spelling of a unit, in lower case and singular -> its name."""
SINGLE_LETTERS = "mshgl"
"""Single letters that are units after a space; any other letter, and any beside its number, is a variable."""


class Quantity(NamedTuple):
    """A number with its unit."""

    value: Fraction
    unit: str = ""
    """Name of the unit, % for a percentage; empty for none."""


def parse_quantity(text: str) -> Quantity | None:
    """The quantity that a normalised text spells; None where it is something else."""
    if len(text) > MAX_NUMBER_CHARACTERS:
        return None
    plain = re.sub(r" {2,}", " ", TEXT_COMMAND.sub(r" \1", text)).strip()
    currency = ""
    if found := re.match(rf"([-+]?) ?({CURRENCY.pattern}) ?", plain):
        plain, currency = found[1] + plain[found.end() :], found[2]
    match = NUMBER.match(plain)
    if match is None or (value := _value(match)) is None:
        return None
    rest = plain[match.end() :]
    if rest.lower() in ("st", "nd", "rd", "th"):
        rest = ""
    if found := re.fullmatch(rf" ?({CURRENCY.pattern})", rest):
        rest, currency = "", found[1]
    if found := re.match(rf" ?({'|'.join(SCALES)})(?![A-Za-z])", rest, re.IGNORECASE):
        value, rest = value * SCALES[found[1].lower()], rest[found.end() :]
    unit = f"base {match['base']}" if match["base"] else unit_name(rest) if rest.strip() else ""
    if unit is None or (unit and currency and UNITS.get(currency.lower()) != unit):
        return None
    return Quantity(value, unit or (unit_name(f" {currency}") if currency else "") or "")


def _value(match: re.Match[str]) -> Fraction | None:
    sign = -1 if match["sign"] == "-" else 1
    if match["whole"]:
        top, bottom = map(int, re.findall(r"[0-9]+", match["part"] or "") or _pair(match["pair"]))
        return sign * (_number(match["whole"]) + Fraction(top, bottom)) if bottom else None
    if match["fraction"]:
        top, bottom = map(int, _pair(match["fraction"]))
        return sign * Fraction(top, bottom) if bottom else None
    if match["period"]:
        start, period = match["start"], match["period"]
        decimals = len(start.partition(".")[2])
        repeated = Fraction(int(period), (10 ** len(period) - 1) * 10**decimals)
        return sign * (_number(start if start != "." else "0") + repeated)
    if power := match["ten"] or match["bare"]:
        return sign * Fraction(10) ** int(power) if abs(int(power)) <= MAX_EXPONENT else None
    value = _number(match["decimal"])
    if match["power"]:
        power = int(re.findall(r"[-+]?[0-9]+", match["power"])[-1])
        return sign * value * Fraction(10) ** power if abs(power) <= MAX_EXPONENT else None
    divisor = _number(match["divisor"] or "1")
    return sign * value / divisor if divisor else None


def _pair(text: str) -> list[str]:
    """Numerator and denominator of `{1}{2}` or `12`."""
    return re.findall(r"-?[0-9]+", text) if "{" in text else re.findall(r"[0-9]", text)


def _number(text: str) -> Fraction:
    return Fraction(text.replace(",", "").replace(" ", "").rstrip(".") or "0")


def unit_name(text: str) -> str | None:
    """The name of the unit that follows a number; None where the text is no unit."""
    match = UNIT.fullmatch(text)
    if match is None:
        return UNITS.get(text.strip().lower())
    if match["percent"]:
        return "%"
    if match["words"] is None:
        return f"degree {match['degrees'].lower()}".strip()
    spelt = match["words"]
    glued, plain = not spelt.startswith(" "), re.sub(r"[{}^]", "", spelt.lower()).strip(" .")
    letter = len(plain) == 1 and plain.isascii()
    if plain in UNITS and not letter:
        return UNITS[plain]
    if NO_UNITS.search(plain):
        return None
    words = [_word(word) for word in plain.replace("/", " / ").split()]
    if words[0] in ("square", "sq", "cubic", "cu") and len(words) > 1:
        words[:2] = [words[1] + ("2" if words[0].startswith("s") else "3")]
    known = all(re.sub(r"-?[0-9]$", "", word) in UNITS or word in ("/", "per") for word in words)
    ascii_word = words[0].isascii()
    short = min(len(re.sub(r"-?[0-9]$", "", word)) for word in words if word != "/")
    if known:
        allowed = not letter or (not glued and plain in SINGLE_LETTERS)
    else:
        allowed = not ascii_word or (not glued and short >= 2 and len(words[0]) > 2)
    return " ".join("/" if word == "per" else word for word in words) if allowed else None


def _word(word: str) -> str:
    """One word of a unit in its usual spelling, with its exponent."""
    stem, exponent = re.fullmatch(r"(.*?)\.?(-?[0-9]?)", word, re.DOTALL).groups()  # type: ignore[union-attr]
    for one in (stem, stem.removesuffix("s"), stem.removesuffix("es")):
        if one in UNITS:
            return UNITS[one] + exponent
    return str(stem.removesuffix("s") if len(stem) > 3 else stem) + exponent


def same_unit(unit: str, true_unit: str) -> bool:
    """Whether units agree: one of them is missing, both are equal, or one only says more of the same thing."""
    if not unit or not true_unit or unit == true_unit:
        return True
    words, true_words = set(unit.split()), set(true_unit.split())
    return (
        "/" not in words | true_words and (words < true_words or true_words < words) and not _measures(unit, true_unit)
    )


def _measures(*units: str) -> bool:
    return any(unit.startswith(("%", "degree", "base")) for unit in units)


def same_quantity(one: Quantity, true: Quantity) -> bool:
    """Whether two quantities are equal; `true` is the truth."""
    if one.unit == true.unit == "%" or "%" not in (one.unit, true.unit):
        return one.value == true.value and same_unit(one.unit, true.unit)
    if one.unit and true.unit:
        return False
    percent, plain = (one, true) if one.unit == "%" else (true, one)
    # 50% is 50 too; where the truth is itself a share, such as 0.5, 0.5% is not meant.
    spelt = true is percent or abs(true.value) > 1 or true.value.denominator == 1
    return plain.value == percent.value / 100 or (spelt and plain.value == percent.value)
