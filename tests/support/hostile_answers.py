"""Answers that try to hang, blow up, or run something in whatever judges them; none of them equals 14."""

from __future__ import annotations


def nested(before: str, inside: str, after: str, times: int) -> str:
    return before * times + inside + after * times


def hostile_answers() -> list[str]:
    """200 answers, cheap and costly ones mixed, always in the same order."""
    towers = [
        base + "".join("^{" + exponent for exponent in exponents) + "}" * len(exponents)
        for base in ("9", "10", "2", "0.5", "(-3)", "x")
        for exponents in (("9", "9"), ("9", "9", "9"), ("10", "10", "10", "10"), ("999999999",), ("x", "10", "9"))
    ]
    factorials = [f"{n}!" for n in (1000, 10**5, 10**7, 10**9, 10**12)]
    factorials += ["1000!!", "((10!)!)!", "(10^9)!", "\\frac{10^8!}{10^7!}", "\\binom{10^9}{10^8}", "\\Gamma(10^9)"]
    endless = [
        "\\sum_{k=1}^{10^9} \\sin k",
        "\\prod_{k=1}^{10^9} k",
        "\\sum_{k=1}^{\\infty} \\frac{\\sin k}{k^k}",
        "\\int_0^1 x^{x^{x}} dx",
        "\\int_0^{\\infty} e^{-x^{99}} \\sin(x^{98}) dx",
        "\\lim_{x \\to 0} \\frac{\\sin^{99} x}{x^{98} \\tan(\\tan x)}",
        "(x+1)^{100000}",
        "(a+b+c+d+e)^{200}",
        "x^{1000000} + x^{999999} + 1",
        "\\sqrt[10^9]{10^{10^9}}",
        "\\sin(10^{10^{8}})",
        "\\log(10^{10^{10}})",
        "10^{-10^{10^{10}}}",
        "\\gcd(10^{10^7}, 10^{10^7} - 1)",
        "2^{2^{127}} \\mod 7",
        "123456789123456789123456789^{1/7} = x",
        "x^5 - x - 1 = 0",
        "\\{x : x^{99} + x + 1 = 0\\}",
        "(0, 10^{10^{10}})",
        "\\begin{pmatrix} 9^{9^9} & 1 \\\\ 1 & 9^{9^9} \\end{pmatrix}^{99}",
    ]
    deep = [
        nested(before, inside, after, times)
        for before, inside, after in (
            ("(", "1", ")"),
            ("{", "1", "}"),
            ("[", "1", "]"),
            ("\\frac{1}{", "2", "}"),
            ("\\sqrt{", "2", "}"),
            ("2^{", "2", "}"),
            ("\\left(", "1", "\\right)"),
            ("|", "1", "|"),
            ("-", "1", ""),
            ("\\sin ", "1", ""),
            ("\\boxed{", "13", "}"),
            ("$", "13", "$"),
        )
        for times in (20, 60, 120, 5000)
    ]
    long = [
        text * (1_000_000 // len(text))
        for text in ("9", "9.", "1+", "(", "\\frac{1}{2}", " ", "x", "\u4e00", "-", "\n")
    ]
    long += [
        text * (900 // len(text)) for text in ("9", "1+", "2*", "1/", "0.1", "(1)", "x+", "9^", "\\sin", ",1", "=1")
    ]
    odd = ["\x00", "\x00" * 500, "\ud800", "\udfff13", "\u202e41", "\u0661\u0664", "\U0001d7cf\U0001d7d2", "1\u20674"]
    odd += ["\u06f1\u06f4", "\uff11\uff14.1", "\u00b9\u2074", "\u2167", "\u221e", "\u2212\u00a014", "e\u0301" * 400]
    odd += [
        "\u200b13\u200b",
        "\ufeff13",
        "\u4e00\u56db",
        "13\u3002",
        "\u534141",
        "NaN",
        "inf",
        "-0",
        "1e999999999",
        "0x0e",
    ]
    code = [
        "__import__('os').system('touch CANARY')",
        "__import__('os')._exit(0)",
        "exec('import os; os.abort()')",
        "eval('14')",
        "().__class__.__mro__[1].__subclasses__()",
        "\\text{__import__('os').system('touch CANARY')}",
        "\\input{/etc/passwd}",
        "\\write18{touch CANARY}",
        "lambda: 14",
        "open('/etc/passwd').read()",
        "{{7*7}}",
        "${jndi:ldap://localhost/a}",
        "$(touch CANARY)",
        "`touch CANARY`",
        "'; DROP TABLE answers; --",
        '{"right": true}',
        "true",
        "true\ntrue\ntrue",
        "\\operatorname{print}(14)",
        "1 if True else 2",
        "14\ntrue",
        "sys.exit(0)",
        "os.kill(os.getppid(), 9)",
        "input()",
    ]
    guesses = [
        "13 or 14",
        "13, 14",
        "\\{13, 14\\}",
        "14 or 15",
        "not 14",
        "14 = 13",
        "x > 13",
        "14 \\lor 15",
        "[13, 15]",
    ]
    guesses += ["13} \\boxed{14", "\\boxed{13} \\boxed{14}", "14 \\pm 1", "14\\ldots 15", "14; 15", "14 15", "1 4"]
    guesses += ["14 to 15", "13 < 14", "14?15", "14 and 15", "15 - 1 = 13", "14e1"]
    answers = [*towers, *factorials, *endless, *deep, *long, *odd, *code, *guesses]
    mixed = [answers[(index * 61) % len(answers)] for index in range(len(answers))]
    return mixed[:200]
