"""Solved problems in English and Chinese, drawn in several forms, and the same with planted faults of known kinds."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from megatron_r1.data.synthetic.expressions import careful_steps, training_expressions

NAMES = {"en": ["Anna", "Omar", "Zoë", "Mr Lindqvist", "Priya"], "zh": ["小明", "李华", "王芳", "张伟"]}
THINGS = {"en": ["pens", "apples", "stickers", "tickets"], "zh": ["支笔", "个苹果", "张邮票", "本书"]}


@dataclass(frozen=True)
class Solved:
    """A problem with reasoning and summary."""

    question: str
    steps: tuple[str, ...]
    """Paragraphs of the reasoning."""
    summary: str
    truth: str
    task: str = "number"
    language: str = "en"

    @property
    def reasoning(self) -> str:
        return "\n\n".join(self.steps)

    @property
    def response(self) -> str:
        return f"<think>{self.reasoning}</think>\n\n{self.summary}"

    def row(self, id: str, **fields: Any) -> dict[str, Any]:
        sampled = {"question": self.question, "response": self.response, "truth": self.truth, "task": self.task}
        return {"id": id, **sampled, "finish_reason": "stop", **fields}


Form = Callable[[random.Random, int], Solved]
"""Draws a problem; the answer is off by the number given, through reasoning and summary alike."""


def concluded(rng: random.Random, language: str, answer: str, lead: str) -> str:
    """A summary that gives the answer in one of the usual ways."""
    if language == "en":
        ends = (f"The answer is {answer}.", f"So the final answer is $\\boxed{{{answer}}}$.", f"**Answer:** {answer}",
                f"<answer>{answer}</answer>")  # fmt: skip
    else:
        ends = (
            f"答案是{answer}。",
            f"所以最后的答案为 $\\boxed{{{answer}}}$。",
            f"答案：{answer}",
            f"<answer>{answer}</answer>",
        )
    end = rng.choice(ends)
    return end if end.startswith("<answer>") else f"{lead} {end}"


def shop(rng: random.Random, off: int) -> Solved:
    name, thing = rng.choice(NAMES["en"]), rng.choice(THINGS["en"])
    boxes, each, away = rng.randint(3, 40), rng.randint(4, 60), rng.randint(1, 11)
    left = boxes * each - away + off
    question = f"{name} buys {boxes} boxes with {each} {thing} each and gives away {away} {thing}. How many are left?"
    steps = (
        f"{name} has {boxes} boxes, and in each of them there are {each} {thing}. I multiply: {boxes} * {each} = "
        f"{boxes * each}.",
        f"Then {away} are given away, so I subtract: {boxes * each} - {away} = {left}.",
        f"Let me check by going back: {left} + {away} = {left + away}. That fits, so I am done.",
    )
    return Solved(
        question, steps, concluded(rng, "en", str(left), f"{boxes} boxes hold {boxes * each}."), str(left - off)
    )


def rectangle(rng: random.Random, off: int) -> Solved:
    a, b = rng.randint(3, 99), rng.randint(3, 99)
    area = a * b + off
    question = f"In rectangle $ABCD$, $AB = {a}$ cm and $BC = {b}$ cm. What is its area in square centimetres?"
    steps = (
        "The sides AB and BC meet at a right angle, because ABCD is a rectangle. Its area is $AB \\cdot BC$.",
        f"With AB = {a} cm and BC = {b} cm this is ${a} \\times {b} = {area}$, in cm^2.",
        "Is that plausible? The triangle ABC would have half of it, which looks right.",
    )
    return Solved(
        question, steps, concluded(rng, "en", str(area), "The area is the product of the sides."), str(area - off)
    )


def triangle(rng: random.Random, off: int) -> Solved:
    first, second = rng.randint(20, 80), rng.randint(20, 80)
    third = 180 - first - second + off
    question = f"In triangle ABC the angle α at A is {first}° and the angle β at B is {second}°. Find γ in degrees."
    steps = (
        "The angles of a triangle add up to 180°, so α + β + γ = 180°.",
        f"I know α = {first}° and β = {second}°. Their sum is {first + second}°. Hence γ = 180° - {first + second}° = "
        f"{third}°.",
        "Wait, did I take the right angle? γ is at C, and only C is left. Yes.",
    )
    return Solved(question, steps, concluded(rng, "en", str(third), "γ is what is left of 180°."), str(third - off))


def equation(rng: random.Random, off: int) -> Solved:
    x, a, b = rng.randint(2, 90), rng.randint(2, 30), rng.randint(1, 99)
    root = x + off
    question = f"Solve for $x$: ${a}x + {b} = {a * x + b}$."
    steps = (
        f"1. Subtract {b} from both sides: ${a}x = {a * x + b} - {b} = {a * x}$.",
        f"2. Divide by {a}: $x = \\frac{{{a * x}}}{{{a}}} = {root}$.",
        f"3. Put it in to be sure. The left side becomes {a} times {root} plus {b}, as it should.",
    )
    return Solved(question, steps, concluded(rng, "en", str(root), "Isolate x, then divide."), str(root - off), "math")


def price(rng: random.Random, off: int) -> Solved:
    cost, percent = 100 * rng.randint(11, 990), rng.randint(2, 40)
    rest = cost * (100 - percent) // 100 + off
    question = f"A machine costs ${cost:,} and loses {percent}% of its value. What is it worth then, in dollars?"
    steps = (
        f"{percent}% of ${cost:,} is {cost * percent // 100:,} dollars, since one percent is {cost // 100}.",
        f"I take that away: {cost:,} - {cost * percent // 100:,} = {rest:,}. A rough check: the value has to be below "
        f"{cost:,}, and it is.",
    )
    return Solved(question, steps, concluded(rng, "en", f"{rest:,}", f"It loses {percent} percent."), str(rest - off))


DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]


def weekday(rng: random.Random, off: int) -> Solved:
    start, days = rng.randrange(7), rng.randint(8, 300)
    day = DAYS[(start + days + off) % 7]
    question = f"Today is {DAYS[start]}. Which day of the week is it in {days} days?"
    steps = (
        f"After seven days it is {DAYS[start]} again, so only the remainder counts. {days} divided by 7 leaves "
        f"{days % 7}.",
        f"From {DAYS[start]} I go {days % 7} days forward and reach {day}.",
    )
    summary = f"{days} days are {days // 7} weeks and {days % 7} days.\n\n<answer>{day}</answer>"
    return Solved(question, steps, summary, DAYS[(start + days) % 7], "text")


def fraction(rng: random.Random, off: int) -> Solved:
    one, other = rng.sample(range(2, 40), 2)
    total = Fraction(1, one) + Fraction(1, other)
    shown = total + Fraction(off, total.denominator)
    question = f"What is $\\frac{{1}}{{{one}}} + \\frac{{1}}{{{other}}}$ as a fraction?"
    answer = f"\\frac{{{shown.numerator}}}{{{shown.denominator}}}"
    steps = (
        f"I need a common denominator of {one} and {other}; their product {one * other} always works.",
        f"The first fraction becomes ${other}/{one * other}$, the second ${one}/{one * other}$.",
        f"Their sum, reduced as far as possible, is ${answer}$.",
    )
    summary = f"With a common denominator the sum is $\\boxed{{{answer}}}$."
    return Solved(question, steps, summary, f"{total.numerator}/{total.denominator}", "math")


def letters(rng: random.Random, off: int) -> Solved:
    values = rng.sample(range(100, 1000), 4)
    best = (values.index(max(values)) + off) % 4
    listed = " ".join(f"({letter}) {value}" for letter, value in zip("ABCD", values, strict=True))
    question = f"Which of these numbers is the largest? {listed}"
    steps = (
        f"I compare them two at a time. Between {values[0]} and {values[1]}, {max(values[:2])} is larger.",
        f"Between {values[2]} and {values[3]}, {max(values[2:])} is larger. The winner of both is {values[best]}.",
    )
    truth = "ABCD"[values.index(max(values))]
    return Solved(
        question, steps, f"The largest one is {values[best]}.\n\n<answer>{'ABCD'[best]}</answer>", truth, "choice"
    )


def expression_steps(rng: random.Random, off: int) -> tuple[str, str, int]:
    expression = rng.choice(training_expressions(rng.choice(["+*", "*+", "*-", "++"]), 0.15))
    first, second = careful_steps(expression)
    result = second[3] + off
    return (
        expression,
        f"{first[0]} {first[1]} {first[2]} = {first[3]}, {second[0]} {second[1]} {second[2]} = {result}",
        result,
    )


def tiny(rng: random.Random, off: int) -> Solved:
    expression, steps, result = expression_steps(rng, off)
    question = rng.choice(["What is {}?", "Calculate {}.", "Compute {}."]).format(expression)
    return Solved(question, (steps,), f"<answer>{result}</answer>", str(result - off))


def tiny_chinese(rng: random.Random, off: int) -> Solved:
    expression, steps, result = expression_steps(rng, off)
    question = rng.choice(["{}等于多少？", "计算{}。", "求{}的值。"]).format(expression)
    steps = "先算" + steps.replace(", ", "，再算")
    return Solved(question, (steps,), f"<answer>{result}</answer>", str(result - off), language="zh")


def shop_chinese(rng: random.Random, off: int) -> Solved:
    name, thing = rng.choice(NAMES["zh"]), rng.choice(THINGS["zh"])
    boxes, each, away = rng.randint(3, 40), rng.randint(4, 60), rng.randint(1, 11)
    left = boxes * each - away + off
    question = f"{name}买了{boxes}盒，每盒有{each}{thing}，送给同学{away}{thing}。还剩多少{thing}？"
    steps = (
        f"{name}一共有{boxes}盒，每盒{each}{thing}，所以总数是{boxes} × {each} = {boxes * each}。",
        f"送出去{away}{thing}，要减掉：{boxes * each} - {away} = {left}。",
        f"我再检查一遍：{left} + {away} = {left + away}，和前面的总数一致，没有问题。",
    )
    return Solved(
        question, steps, concluded(rng, "zh", str(left), f"总数是{boxes * each}。"), str(left - off), "number", "zh"
    )


def triangle_chinese(rng: random.Random, off: int) -> Solved:
    first, second = rng.randint(20, 80), rng.randint(20, 80)
    third = 180 - first - second + off
    question = f"在△ABC中，∠A = {first}°，∠B = {second}°，求∠C的度数。"
    steps = (
        "三角形的内角和是180°，所以∠A + ∠B + ∠C = 180°。",
        f"代入已知的两个角：{first}° + {second}° = {first + second}°，于是∠C = 180° - {first + second}° = {third}°。",
        "等一下，题目要求的是C点的角，前面用的是A和B，没有弄错。",
    )
    return Solved(
        question, steps, concluded(rng, "zh", str(third), "用内角和减去另外两个角。"), str(third - off), "number", "zh"
    )


def equation_chinese(rng: random.Random, off: int) -> Solved:
    x, a, b = rng.randint(2, 90), rng.randint(2, 30), rng.randint(1, 99)
    root = x + off
    question = f"解方程：${a}x + {b} = {a * x + b}$，求$x$。"
    steps = (
        f"第一步，两边同时减去{b}，得到 ${a}x = {a * x}$。",
        f"第二步，两边同时除以{a}，得到 $x = \\frac{{{a * x}}}{{{a}}} = {root}$。",
        f"第三步，把$x = {root}$代回原方程检验，左右两边应当相等，也不需要换算单位，例如cm或kg。",
    )
    return Solved(
        question, steps, concluded(rng, "zh", str(root), "先移项，再除以系数。"), str(root - off), "math", "zh"
    )


FORMS: tuple[Form, ...] = (
    shop, rectangle, triangle, equation, price, weekday, fraction, letters, tiny, tiny_chinese, shop_chinese,
    triangle_chinese, equation_chinese,
)  # fmt: skip


def draw(rng: random.Random, used: set[str], off: int = 0, forms: tuple[Form, ...] = FORMS) -> Solved:
    """A problem whose question was not drawn before."""
    solved = rng.choice(forms)(rng, off)
    while solved.question in used:
        solved = rng.choice(forms)(rng, off)
    used.add(solved.question)
    return solved


LONG_FORMS = tuple(form for form in FORMS if form not in (tiny, tiny_chinese))
OTHER_SENTENCE = {"en": "所以我们可以直接得到结果。", "zh": "So we can get the result directly."}
OTHER_WORD = {"en": "所以", "zh": "therefore"}
LOOP = {"en": "Let me check that again. ", "zh": "让我再检查一遍。"}
FILLER = {"en": "and then I think about it once more from side number {}, ", "zh": "然后我又从第{}个角度想了一下，"}
CODE = "def solve(a, b):\n    total = a * b\n    return total"


def _in_reasoning(solved: Solved, text: str) -> Solved:
    """A text as a further paragraph before the last one."""
    return replace(solved, steps=(*solved.steps[:-1], text, solved.steps[-1]))


def faults(rng: random.Random, used: set[str], count: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Kind of fault and row, `count` of each kind."""
    for number in range(count):
        for kind, plant in PLANTS.items():
            solved, fields = plant(rng, used)
            yield kind, solved.row(f"{kind}-{number}", **fields)


Planted = tuple[Solved, dict[str, Any]]
"""A problem, and fields of its row that replace those of a clean one."""


def _wrong(rng: random.Random, used: set[str]) -> Planted:
    return draw(rng, used, rng.choice([-2, -1, 1, 2]), tuple(form for form in FORMS if form is not fraction)), {}


def _mixed_sentence(rng: random.Random, used: set[str]) -> Planted:
    solved = draw(rng, used, forms=LONG_FORMS)
    return _in_reasoning(solved, OTHER_SENTENCE[solved.language]), {}


def _mixed_word(rng: random.Random, used: set[str]) -> Planted:
    solved = draw(rng, used, forms=LONG_FORMS)
    return replace(solved, steps=(OTHER_WORD[solved.language] + " " + solved.steps[0], *solved.steps[1:])), {}


def _other_language(rng: random.Random, used: set[str]) -> Planted:
    solved = draw(rng, used, forms=(tiny, tiny_chinese))
    other = "先算一下，结果是" if solved.language == "en" else "First I calculate, and the result is "
    return solved, {"response": f"<think>{other}{solved.truth}</think> <answer>{solved.truth}</answer>"}


def _truncated(rng: random.Random, used: set[str]) -> Planted:
    solved = draw(rng, used, forms=LONG_FORMS)
    return solved, {"response": solved.response[: -rng.randint(1, 9)], "finish_reason": "length"}


def _never_closed(rng: random.Random, used: set[str]) -> Planted:
    solved = draw(rng, used, forms=LONG_FORMS)
    return solved, {"response": f"<think>{solved.reasoning}\n\n{solved.summary}"}


def _no_reasoning(rng: random.Random, used: set[str]) -> Planted:
    solved = draw(rng, used)
    return solved, {"response": rng.choice([f"<think></think>\n\n{solved.summary}", solved.summary])}


def _trivial_reasoning(rng: random.Random, used: set[str]) -> Planted:
    solved = draw(rng, used)
    return replace(solved, steps=(rng.choice(["OK.", "...", solved.question, solved.truth, solved.summary]),)), {}


def _no_summary(rng: random.Random, used: set[str]) -> Planted:
    solved = draw(rng, used, forms=LONG_FORMS)
    return solved, {"response": f"<think>{solved.reasoning}\n{solved.summary}</think>\n"}


def _leaked_tag(rng: random.Random, used: set[str]) -> Planted:
    solved = draw(rng, used, forms=LONG_FORMS)
    tag = rng.choice(["<think>", "</answer>", "<|im_end|>", "|special_token|", "<｜end▁of▁sentence｜>"])
    return solved, {"response": f"<think>{solved.reasoning}</think>\n\n{tag} {solved.summary}"}


def _repetition(rng: random.Random, used: set[str]) -> Planted:
    solved = draw(rng, used, forms=LONG_FORMS)
    return _in_reasoning(solved, LOOP[solved.language] * rng.randint(6, 20)), {}


def _repeated_reasoning(rng: random.Random, used: set[str]) -> Planted:
    solved = draw(rng, used, forms=(shop, rectangle, shop_chinese, triangle_chinese, equation_chinese))
    return replace(solved, steps=solved.steps * 3), {}


def _long_paragraph(rng: random.Random, used: set[str]) -> Planted:
    solved = draw(rng, used, forms=LONG_FORMS)
    filler = "".join(FILLER[solved.language].format(rng.randint(10**6, 10**9)) for _ in range(120))
    return _in_reasoning(solved, filler), {}


def _code_block(rng: random.Random, used: set[str]) -> Planted:
    solved = draw(rng, used, forms=LONG_FORMS)
    return _in_reasoning(solved, f"```python\n{CODE}\n```"), {}


def _code_lines(rng: random.Random, used: set[str]) -> Planted:
    return _in_reasoning(draw(rng, used, forms=LONG_FORMS), CODE), {}


def _summary_disagrees_with_reasoning(rng: random.Random, used: set[str]) -> Planted:
    solved = draw(rng, used, forms=(shop, rectangle, triangle, shop_chinese, triangle_chinese))
    other = str(int(solved.truth) + rng.randint(3, 9) * 1000)
    said = f"So the answer is {other}." if solved.language == "en" else f"所以答案是{other}。"
    return replace(solved, steps=(*solved.steps, said)), {}


def _summary_with_two_answers(rng: random.Random, used: set[str]) -> Planted:
    solved = draw(rng, used, forms=(shop, rectangle, triangle, shop_chinese, triangle_chinese))
    other = int(solved.truth) + rng.randint(1, 9)
    said = f"The answer is {other}." if solved.language == "en" else f"答案是{other}。"
    return replace(solved, summary=f"{said} \\boxed{{{solved.truth}}}"), {}


def _answer_from_nowhere(rng: random.Random, used: set[str]) -> Planted:
    while (solved := draw(rng, used, forms=(price, equation, shop_chinese))).truth in ("3", "4", "7"):
        pass
    steps = ("I look at what is given and think about it for a while.",)
    steps = steps if solved.language == "en" else ("我先看看题目给了什么，然后想了一会儿。",)
    given = solved.question.split("$")[0] if solved.language == "en" else solved.question[:6]
    return replace(solved, steps=(*steps, f"{given} 3 + 4 = 7.")), {}


def _broken_characters(rng: random.Random, used: set[str]) -> Planted:
    solved = draw(rng, used, forms=LONG_FORMS)
    at = rng.randrange(len(solved.steps[0]))
    return replace(solved, steps=(solved.steps[0][:at] + "\ufffd" + solved.steps[0][at:], *solved.steps[1:])), {}


def _signs_only(rng: random.Random, used: set[str]) -> Planted:
    solved = draw(rng, used, forms=LONG_FORMS)
    return _in_reasoning(solved, "".join(rng.choice("~#|@&;:^_=") for _ in range(900))), {}


PLANTS: dict[str, Callable[[random.Random, set[str]], Planted]] = {
    plant.__name__.lstrip("_"): plant
    for plant in (
        _wrong, _mixed_sentence, _mixed_word, _other_language, _truncated, _never_closed, _no_reasoning,
        _trivial_reasoning, _no_summary, _leaked_tag, _repetition, _repeated_reasoning, _long_paragraph, _code_block,
        _code_lines, _summary_disagrees_with_reasoning, _summary_with_two_answers, _answer_from_nowhere,
        _broken_characters, _signs_only,
    )
}  # fmt: skip


def duplicates(rng: random.Random, clean: list[Solved], count: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Kind and row of copies of clean problems: exact, in other spacing, and with a sentence added."""
    long = [solved for solved in clean if len(solved.steps) > 1]
    for number in range(count):
        solved = rng.choice(clean)
        yield "copied", solved.row(f"copied-{number}")
        solved = rng.choice(clean)
        text = solved.response.replace(". ", ".  ").replace("，", "， ").replace("\n\n", "\n\n\n")
        yield "reformatted", solved.row(f"reformatted-{number}", response=text + "\n")
        solved = rng.choice(long)
        said = "So I can write it down." if solved.language == "en" else "可以写下来了。"
        yield "reworded", replace(solved, steps=(*solved.steps, said)).row(f"reworded-{number}")
