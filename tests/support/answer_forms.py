"""Forms of an answer: each draws a true answer, answers that are right in other words, and answers that are wrong."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple


class Drawn(NamedTuple):
    """One true answer and answers to compare with it."""

    truth: str
    right: list[str]
    wrong: list[str]


Form = Callable[[random.Random], Drawn]


def integers(rng: random.Random) -> Drawn:
    n = rng.randint(-5000, 5000)
    return Drawn(f"{n}", [f"{n}.0", f"${n}$", f"\\boxed{{{n}}}"], [f"{n + 1}", f"{n}1", f"{n}.5"])


def thousands(rng: random.Random) -> Drawn:
    n = rng.randint(1000, 10**7)
    with_commas = f"{n:,}"
    right = [
        with_commas,
        with_commas.replace(",", "{,}"),
        with_commas.replace(",", "\\,"),
        with_commas.replace(",", " "),
    ]
    return Drawn(f"{n}", right, [f"{n + 1:,}", with_commas.split(",")[0]])


def decimals(rng: random.Random) -> Drawn:
    n = rng.randint(101, 99999)
    text = f"{n / 1000:.3f}"
    return Drawn(text, [f"{text}0", f"\\frac{{{n}}}{{1000}}", f"{n}/1000"], [f"{(n + 1) / 1000:.3f}", f"{n / 100:.3f}"])


def fractions(rng: random.Random) -> Drawn:
    a, b = _fraction(rng)
    right = [f"\\frac{{{a}}}{{{b}}}", f"\\dfrac{{{3 * a}}}{{{3 * b}}}", f"{a}/{b}", f"\\tfrac {{{a}}} {{{b}}}"]
    return Drawn(f"{a}/{b}", right, [f"\\frac{{{b}}}{{{a}}}", f"{a + 1}/{b}", f"{a}{b}"])


def negative_fractions(rng: random.Random) -> Drawn:
    a, b = _fraction(rng)
    right = [f"-{a}/{b}", f"\\frac{{-{a}}}{{{b}}}", f"\u2212\\frac{{{a}}}{{{b}}}"]
    return Drawn(f"-\\frac{{{a}}}{{{b}}}", right, [f"\\frac{{{a}}}{{{b}}}", f"-{b}/{a}"])


def mixed_numbers(rng: random.Random) -> Drawn:
    whole, (a, b) = rng.randint(1, 20), _fraction(rng, proper=True)
    total = whole * b + a
    right = [f"{whole} {a}/{b}", f"{whole}\\frac{{{a}}}{{{b}}}", f"{whole} \\dfrac{{{a}}}{{{b}}}", f"{total}/{b}"]
    return Drawn(f"\\frac{{{total}}}{{{b}}}", right, [f"{whole + 1} {a}/{b}", f"{whole * a}/{b}", f"{whole}"])


def vulgar_fractions(rng: random.Random) -> Drawn:
    sign, value = rng.choice([("\u00bd", 0.5), ("\u00bc", 0.25), ("\u00be", 0.75), ("\u215b", 0.125)])
    whole = rng.randint(1, 50)
    return Drawn(f"{whole + value}", [f"{whole}{sign}", f"{whole} {sign}"], [sign, f"{whole}", f"{whole + 1}{sign}"])


def percents(rng: random.Random) -> Drawn:
    n = rng.randint(1, 99)
    right = [f"{n}%", f"{n}", f"{n / 100}", f"{n} percent", f"{n} \\%", f"${n}\\%$"]
    return Drawn(f"{n}\\%", right, [f"{n + 1}%", f"{n / 1000}", f"{n * 100}%"])


def shares(rng: random.Random) -> Drawn:
    n = rng.randint(2, 98)
    return Drawn(f"{n / 100}", [f"{n}%", f"{n}\\%", f"{n}/100"], [f"{n / 100}%", f"{n + 1}%", f"{n}"])


def scientific(rng: random.Random) -> Drawn:
    digits, power = rng.randint(101, 999) / 100, rng.choice([-34, -9, -7, 4, 9, 23])
    right = [
        f"{digits}e{power}",
        f"{digits}E{power:+d}",
        f"{digits} \\cdot 10^{{{power}}}",
        f"{digits}\u00d710^{power}",
        f"{digits} * 10^{{{power}}}",
    ]
    wrong = [f"{digits}e{power + 1}", f"{digits + 0.01:.2f} \\times 10^{{{power}}}", f"{digits}"]
    return Drawn(f"{digits} \\times 10^{{{power}}}", right, wrong)


def tiny_powers(rng: random.Random) -> Drawn:
    n = rng.randint(20, 200)
    right = [f"2^{{-{n}}}", f"\\left(\\frac{{1}}{{2}}\\right)^{{{n}}}", f"1/2^{{{n}}}"]
    return Drawn(f"\\frac{{1}}{{2^{{{n}}}}}", right, [f"\\frac{{1}}{{2^{{{n - 1}}}}}", "0", f"2^{{{n}}}"])


def huge_powers(rng: random.Random) -> Drawn:
    n = rng.randint(20, 90)
    right = [f"2 \\cdot 2^{{{n - 1}}}", f"{2**n}", f"2^{n}"]
    return Drawn(f"2^{{{n}}}", right, [f"2^{{{n}}} + 1", f"2^{{{n + 1}}}", f"{2**n - 1}"])


def factorials(rng: random.Random) -> Drawn:
    n = rng.randint(20, 60)
    right = [f"\\frac{{{n}}}{{{n + 1}! \\cdot {n}}} \\cdot {n + 1}", f"1/({n}!)"]
    return Drawn(f"\\frac{{1}}{{{n}!}}", right, [f"\\frac{{1}}{{{n + 1}!}}", f"{n}!", "0"])


def units(rng: random.Random) -> Drawn:
    n, unit = rng.randint(2, 900), rng.choice(["cm", "kg", "km", "minutes", "apples", "dollars", "km/h"])
    right = [f"{n} {unit}", f"{n}\\text{{ {unit}}}", f"{n} \\mathrm{{{unit}}}"]
    return Drawn(f"{n}", right, [f"{n + 1} {unit}", f"{n}0 {unit}"])


def other_units(rng: random.Random) -> Drawn:
    n = rng.randint(2, 900)
    one, other = rng.sample(["cm", "m", "km", "kg", "seconds", "hours"], 2)
    right = [f"{n} {one}", f"{n}", f"{n}\\,\\text{{{one}}}", f"**{n} {one}**"]
    return Drawn(f"{n} \\text{{ {one}}}", right, [f"{n} \\text{{ {other}}}", f"{n} {other}", f"{n + 1} {one}"])


def areas(rng: random.Random) -> Drawn:
    n = rng.randint(2, 900)
    right = [f"{n} cm^2", f"{n} cm\u00b2", f"{n} square centimeters", f"{n}", f"{n}\\text{{cm}}^2"]
    return Drawn(f"{n} \\text{{ cm}}^2", right, [f"{n + 1} cm^2", f"{n} m^2", f"{n} cm^3", f"{n} cm"])


def money(rng: random.Random) -> Drawn:
    n = rng.randint(10, 9000)
    right = [f"${n}", f"\\${n}", f"${n:,}.00", f"{n} dollars", f"USD {n}", f"**${n}**"]
    return Drawn(f"{n}", right, [f"${n + 1}", f"${n}.50", f"${n / 100}"])


def degrees(rng: random.Random) -> Drawn:
    n = rng.randint(1, 179)
    right = [f"{n}\u00b0", f"{n}^{{\\circ}}", f"{n} degrees", f"{n}"]
    return Drawn(f"{n}^\\circ", right, [f"{180 - n + 181}\u00b0", f"{n}^2", f"{n} cm"])


def markdown(rng: random.Random) -> Drawn:
    n = rng.randint(2, 9000)
    return Drawn(f"{n}", [f"**{n}**", f"`{n}`", f"*{n}*", f"__{n}__", f"**{n}.**"], [f"**{n + 1}**", f"{n}**2"])


def signs_of_unicode(rng: random.Random) -> Drawn:
    n = rng.randint(2, 900)
    wide = "".join(chr(ord(digit) + 0xFEE0) for digit in str(n))
    right = [f"\u2212{n}", f"\u2013{n}", f"-{wide}", f"\uff0d{wide}", f"-\u200b{n}", f"\u00a0-{n}\u2009"]
    return Drawn(f"-{n}", right, [f"{n}", f"\u2212{n + 1}", wide])


def roots(rng: random.Random) -> Drawn:
    a, b = rng.randint(2, 9), rng.choice([2, 3, 5, 6, 7])
    right = [
        f"\\sqrt{{{a * a * b}}}",
        f"{a}\u221a{b}",
        f"{a}*sqrt({b})",
        f"\\sqrt{{{b}}} \\cdot {a}",
        f"{a} \\sqrt {b}",
    ]
    wrong = [f"{a}\\sqrt{{{b + 1}}}", f"-{a}\\sqrt{{{b}}}", f"\\sqrt{{{a * b}}}", f"{a * math.sqrt(b):.2f}"]
    return Drawn(f"{a}\\sqrt{{{b}}}", right, wrong)


def circles(rng: random.Random) -> Drawn:
    a, b = _fraction(rng)
    right = [f"{a}\u03c0/{b}", f"\\frac{{{a}}}{{{b}}}\\pi", f"{a}*pi/{b}", f"\\frac{{{2 * a}\\pi}}{{{2 * b}}}"]
    return Drawn(f"\\frac{{{a}\\pi}}{{{b}}}", right, [f"\\frac{{{a}}}{{{b}}}", f"{a}\\pi", "3.14"])


def numeric_approximations(rng: random.Random) -> Drawn:
    n = rng.choice([2, 3, 5, 7, 11, 13]) * 100 ** rng.randint(-4, 4)
    value = math.sqrt(n)
    digits = 7 - 1 - math.floor(math.log10(value))
    truth = f"\\sqrt{{{n if n >= 1 else f'{n:.10f}'.rstrip('0')}}}"
    return Drawn(
        truth, [f"{value:.{max(digits, 0)}f}"], [f"{value * 1.0001:.{max(digits, 0)}f}", f"{-value:.{max(digits, 0)}f}"]
    )


def polynomials(rng: random.Random) -> Drawn:
    a, b = rng.randint(1, 9), rng.randint(1, 9)
    right = [f"(x+{a})(x+{b})", f"x^2 + {a + b}x + {a * b}", f"{a * b} + {a + b}x + x\u00b2", f"x^2+{a + b}*x+{a * b}"]
    return Drawn(f"x^2+{a + b}x+{a * b}", right, [f"(x-{a})(x+{b})", f"x^2+{a + b}x", f"y^2+{a + b}y+{a * b}"])


def rational_functions(rng: random.Random) -> Drawn:
    a = rng.randint(2, 9)
    right = [f"\\frac{{{a}}}{{{a}x+{a * a}}}", f"1/(x+{a})", f"(x+{a})^{{-1}}"]
    return Drawn(f"\\frac{{1}}{{x+{a}}}", right, [f"\\frac{{1}}{{x-{a}}}", f"x+{a}", f"\\frac{{1}}{{x}}+{a}"])


def assignments(rng: random.Random) -> Drawn:
    n = rng.randint(-50, 50)
    return Drawn(f"x = {n}", [f"{n}", f"x={n}", f"${n}$"], [f"x = {n + 1}", f"{n + 1}", f"y = {n}"])


def sums_worked_out(rng: random.Random) -> Drawn:
    a, b = rng.randint(2, 90), rng.randint(2, 90)
    return Drawn(
        f"{a + b}", [f"{a} + {b} = {a + b}", f"{a}+{b}"], [f"{a} + {b} = {a + b + 1}", f"{a + 1}+{b} = {a + b}"]
    )


def equations(rng: random.Random) -> Drawn:
    a, b = rng.randint(2, 9), rng.randint(1, 9)
    right = [f"y = {a}x + {b}", f"y={b}+{a}x", f"{a}x - y + {b} = 0"]
    return Drawn(f"y={a}x+{b}", right, [f"y = {a}x - {b}", f"y = {a + 1}x + {b}"])


def less_than(rng: random.Random) -> Drawn:
    n = rng.randint(-20, 20)
    right = [f"x < {n}", f"{n} > x", f"(-\\infty, {n})", f"$x<{n}$"]
    return Drawn(f"x<{n}", right, [f"x > {n}", f"x \\le {n}", f"x < {n + 1}", "x", f"{n}"])


def at_least(rng: random.Random) -> Drawn:
    n = rng.randint(-20, 20)
    right = [f"x >= {n}", f"x\u2265{n}", f"{n} \\leq x", f"[{n}, \\infty)"]
    return Drawn(f"x \\ge {n}", right, [f"x > {n}", f"x \\le {n}", f"x \\ge {n + 1}", f"({n}, \\infty)"])


def chains(rng: random.Random) -> Drawn:
    a = rng.randint(-9, 0)
    b = a + rng.randint(2, 9)
    return Drawn(f"{a} < x < {b}", [f"{a}<x<{b}", f"({a}, {b})"], [f"{a} < x \\le {b}", f"{a}", f"{a} < x < {b + 1}"])


def intervals(rng: random.Random) -> Drawn:
    a = rng.randint(-9, 9)
    b = a + rng.randint(1, 9)
    right = [f"[{a},{b})", f"\\left[{a}, {b}\\right)", f"$[{a}, {b})$"]
    return Drawn(f"[{a}, {b})", right, [f"[{a}, {b}]", f"({a}, {b})", f"[{a}, {b + 1})", f"[{b}, {a})"])


def unions(rng: random.Random) -> Drawn:
    a = rng.randint(-9, 0)
    b = a + rng.randint(1, 9)
    right = [f"(-\\infty,{a})\\cup({b},\\infty)", f"(-\u221e, {a}) \u222a ({b}, \u221e)"]
    return Drawn(
        f"(-\\infty, {a}) \\cup ({b}, \\infty)", right, [f"(-\\infty, {a})", f"(-\\infty, {a}] \\cup ({b}, \\infty)"]
    )


def points(rng: random.Random) -> Drawn:
    a, b = rng.sample(range(-20, 20), 2)
    right = [f"({a},{b})", f"\\left({a}, {b}\\right)", f"$({a},{b})$"]
    return Drawn(f"({a}, {b})", right, [f"({b}, {a})", f"({a}, {b + 1})", f"[{a}, {b}]", f"{a}"])


def small_points(rng: random.Random) -> Drawn:
    n = rng.randint(9, 30)
    right = [f"(10^{{-{n}}}, 1)"]
    return Drawn(f"(10^{{-{n}}},1)", right, [f"(10^{{-{n + 1}}}, 1)", "(0, 1)"])


def sets(rng: random.Random) -> Drawn:
    a, b, c = rng.sample(range(-30, 30), 3)
    right = [f"\\{{{c}, {a}, {b}\\}}", f"{b}, {c}, {a}", f"\\left\\{{{a},{b},{c}\\right\\}}"]
    return Drawn(f"\\{{{a}, {b}, {c}\\}}", right, [f"\\{{{a}, {b}\\}}", f"\\{{{a}, {b}, {c + 1}\\}}", f"{a}"])


def lists(rng: random.Random) -> Drawn:
    a, b = rng.sample(range(2, 60), 2)
    right = [f"{a},{b}", f"{b}, {a}", f"x = {a} or x = {b}", f"{a} \\text{{ and }} {b}"]
    return Drawn(f"{a}, {b}", right, [f"{a}", f"{b}", f"{a}, {b + 1}", f"{a}, {b}, {a + b}"])


def both_signs(rng: random.Random) -> Drawn:
    n = rng.randint(2, 90)
    return Drawn(f"\\pm {n}", [f"\u00b1{n}", f"-{n}, {n}", f"\\pm{n}"], [f"{n}", f"-{n}", f"\\pm {n + 1}"])


def matrices(rng: random.Random) -> Drawn:
    a, b, c, d = (rng.randint(-9, 9) for _ in range(4))

    def matrix(kind: str, last: int) -> str:
        return f"\\begin{{{kind}}} {a} & {b} \\\\ {c} & {last} \\end{{{kind}}}"

    return Drawn(matrix("pmatrix", d), [matrix("bmatrix", d), matrix("pmatrix", d)], [matrix("pmatrix", d + 1), f"{a}"])


def complex_numbers(rng: random.Random) -> Drawn:
    a, b = rng.randint(1, 20), rng.randint(2, 20)
    return Drawn(f"{a}+{b}i", [f"{b}i + {a}", f"{a} + {b} i"], [f"{a}-{b}i", f"{a}", f"{b}+{a + 1}i"])


def exponentials(rng: random.Random) -> Drawn:
    n = rng.randint(2, 12)
    right = [f"\\ln({n}) \\cdot e", f"e\\ln({n})", f"e*ln({n})"]
    return Drawn(f"e \\ln {n}", right, [f"e \\ln {n + 1}", f"\\ln {n}", "e"])


def words(rng: random.Random) -> Drawn:
    one, other = rng.sample(["yes", "no", "even", "odd", "Friday", "Monday", "true", "false", "ellipse"], 2)
    right = [one, one.upper(), f"\\text{{{one.title()}}}", f"**{one}**", f"{one}."]
    return Drawn(f"\\text{{{one}}}", right, [other, f"\\text{{{other}}}", one[::-1], f"not {one}"])


def choices(rng: random.Random) -> Drawn:
    one, other = rng.sample("ABCDE", 2)
    return Drawn(f"\\text{{({one})}}", [one, f"({one})", f"\\textbf{{({one})}}", f"**{one}**"], [other, f"({other})"])


def ratios(rng: random.Random) -> Drawn:
    a, b = rng.sample([2, 3, 5, 7, 11], 2)
    return Drawn(
        f"{a}:{b}", [f"{a} : {b}", f"{2 * a}:{2 * b}", f"${a}\u2236{b}$"], [f"{b}:{a}", f"{a}", f"{a}:{b + 1}"]
    )


def times(rng: random.Random) -> Drawn:
    hour, minute = rng.randint(1, 11), rng.randint(0, 59)
    right = [f"{hour}:{minute:02d}", f"{hour}:{minute:02d} p.m.", f"{hour}:{minute:02d} PM"]
    wrong = [f"{hour + 1}:{minute:02d} pm", f"{hour}:{(minute + 1) % 60:02d} pm", f"{hour}:{minute:02d} am", f"{hour}"]
    return Drawn(f"{hour}:{minute:02d} pm", right, wrong)


def bases(rng: random.Random) -> Drawn:
    digits = "1" + "".join(rng.choice("01") for _ in range(rng.randint(2, 8)))
    right = [f"{digits}_{{2}}", f"{digits}", f"{digits}_2", f"{digits}\u2082"]
    return Drawn(f"{digits}_2", right, [f"{digits}_3", f"{digits}1_2"])


def repeating(rng: random.Random) -> Drawn:
    digit = rng.randint(1, 8)
    right = [f"0.\\overline{{{digit}}}", f"0.\\dot{{{digit}}}", f"{digit}/9", f"{2 * digit}/18"]
    return Drawn(
        f"\\frac{{{digit}}}{{9}}", right, [f"0.{digit}", f"0.{digit}{digit}{digit}", f"0.\\overline{{{digit + 1}}}"]
    )


def repeated_decimals(rng: random.Random) -> Drawn:
    n = rng.randint(10, 98)
    value = Fraction(n, 99)
    return Drawn(f"0.\\overline{{{n}}}", [f"{value.numerator}/{value.denominator}"], [f"0.{n}", f"{n}/100"])


def _fraction(rng: random.Random, proper: bool = False) -> tuple[int, int]:
    b = rng.choice([3, 5, 7, 8, 9, 11, 13])
    a = rng.choice([n for n in range(1, b if proper else 20) if math.gcd(n, b) == 1 and n != b])
    return a, b


FORMS: tuple[Form, ...] = (
    integers, thousands, decimals, fractions, negative_fractions, mixed_numbers, vulgar_fractions, percents, shares,
    scientific, tiny_powers, huge_powers, factorials, units, other_units, areas, money, degrees, markdown,
    signs_of_unicode, roots, circles, numeric_approximations, polynomials, rational_functions, assignments,
    sums_worked_out, equations, less_than, at_least, chains, intervals, unions, points, small_points, sets, lists,
    both_signs, matrices, complex_numbers, exponentials, words, choices, ratios, times, bases, repeating,
    repeated_decimals,
)  # fmt: skip


def draw_pairs(seed: int, draws: int) -> list[tuple[str, str, str, bool]]:
    """Form, truth, answer and whether the answer is right; `draws` truths of every form."""
    pairs = []
    for form in FORMS:
        rng = random.Random(f"{form.__name__} {seed}")
        for _ in range(draws):
            drawn = form(rng)
            pairs += [(form.__name__, drawn.truth, answer, True) for answer in [drawn.truth, *drawn.right]]
            pairs += [(form.__name__, drawn.truth, answer, False) for answer in drawn.wrong]
    return pairs
