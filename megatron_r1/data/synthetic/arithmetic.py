"""The arithmetic world as text: problems in English and Chinese, and documents that solve them well or badly.

A document is one question and one response, as on the web: in several wordings and answer formats, and in qualities
from careful to guessed. Quality and format are drawn independently, so that only the reward tells a model which to
prefer. A model that imitates the text perfectly can solve the problems, but mostly answers wrong.

No document contains a held-out expression. The same config gives the same documents on every machine.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from megatron_r1.config.data import DataConfig
from megatron_r1.data.synthetic.expressions import (
    FORM_SHARES,
    Step,
    careful_steps,
    hasty_steps,
    in_eval_split,
    training_expressions,
    value,
)
from megatron_r1.data.template import fill_template

__all__ = ["Document", "Problem", "documents", "in_eval_split", "worked_documents"]

CHINESE_SHARE = 0.4
OTHER_LANGUAGE_SHARE = 0.1
"""Share of responses in the other language than the question's."""
LARGEST_GUESS_ERROR = 8

QUALITY_SHARES = {"careful": 0.30, "hasty": 0.25, "guess": 0.45}
"""careful honours precedence; hasty takes the wrong order; guess shows no step and names a number near the truth."""

CONTEXT_SHARES = {"template": 0.45, "dialogue": 0.30, "plain": 0.25}
"""The text before the response: the R1-Zero template, a short `Q: ... A: `, or the bare question and a line break."""

FORMAT_SHARES = {"think": 0.35, "sentence": 0.30, "equals": 0.20, "boxed": 0.15}
"""How the answer is given; only the first has reasoning and answer inside tags."""

QUESTIONS = {
    "en": ("What is {}?", "Calculate {}.", "Compute {}.", "Solve {}.", "Evaluate: {}."),
    "zh": ("{}等于多少？", "计算{}。", "求{}的值。"),
}
CHAIN_SUM_QUESTION = "State the final answer to the following arithmetic problem: {} ="
SENTENCES = {"en": "The answer is {}.", "zh": "答案是{}。"}
GUESSES = {"en": "I guess {}.", "zh": "大概是{}。"}
STEPS = {"en": "{}, {}", "zh": "先算{}，再算{}"}
STEP_ENDS = {"en": ". ", "zh": "。"}
DIALOGUES = {"en": "Q: {}\nA: ", "zh": "问：{}\n答："}
LANGUAGES = ("en", "zh")
SUMS = ("++", "+-", "-+", "--")
OPERATOR_PAIRS = tuple(a + b for a in "+-*" for b in "+-*")


class Document(NamedTuple):
    """One document of pre-training text, `prompt + response`, and what it was made from."""

    prompt: str
    response: str
    expression: str
    answer: int
    """The number that the document gives, right or wrong."""
    quality: str
    style: str


@dataclass(frozen=True, slots=True)
class Problem:
    """A question with its true answer."""

    expression: str
    question: str
    answer: str
    language: str
    """en or zh."""
    task: str
    """family, chain_sum or basic_arithmetic."""


class Shares:
    """Draws the keys of a share table."""

    def __init__(self, shares: dict[str, float]):
        self.names, self.bounds = tuple(shares), list(accumulate(shares.values()))

    def draw(self, rng: random.Random) -> str:
        return rng.choices(self.names, cum_weights=self.bounds)[0]


QUALITIES, CONTEXTS, STYLES, FAMILY_FORMS = map(Shares, (QUALITY_SHARES, CONTEXT_SHARES, FORMAT_SHARES, FORM_SHARES))


def draw_problem(rng: random.Random, config: DataConfig) -> Problem:
    """A training problem: mostly of the family, the rest in the wordings and forms of the reasoning-gym tasks."""
    if rng.random() >= config.reasoning_gym_share:
        return family_problem(draw_expression(rng, FAMILY_FORMS.draw(rng), config), rng, config)
    if rng.random() < 0.5:
        expression = draw_expression(rng, rng.choice(SUMS), config)
        return Problem(expression, CHAIN_SUM_QUESTION.format(expression), str(value(expression)), "en", "chain_sum")
    expression = draw_expression(rng, rng.choice(OPERATOR_PAIRS), config)
    question = rng.choice(QUESTIONS["en"]).format(expression)
    return Problem(expression, question, str(value(expression)), "en", "basic_arithmetic")


def draw_expression(rng: random.Random, operators: str, config: DataConfig) -> str:
    return rng.choice(training_expressions(operators, config.eval_fraction))


def family_problem(expression: str, rng: random.Random, config: DataConfig) -> Problem:
    """A question in a random language and wording about `expression`.

    The reasoning-gym tasks are in English only, so more of the family is in Chinese, to reach CHINESE_SHARE of all.
    """
    language = "zh" if rng.random() * (1 - config.reasoning_gym_share) < CHINESE_SHARE else "en"
    question = rng.choice(QUESTIONS[language]).format(expression)
    return Problem(expression, question, str(value(expression)), language, "family")


def write_response(problem: Problem, quality: str, style: str, language: str, rng: random.Random) -> tuple[str, int]:
    """A response of the given quality, format and language, and the number that it gives."""
    truth = int(problem.answer)
    if quality == "guess":
        number = max(0, truth + rng.randint(-LARGEST_GUESS_ERROR, LARGEST_GUESS_ERROR))
        work = GUESSES[language].format(number) if style == "think" else ""
    else:
        steps = careful_steps(problem.expression) if quality == "careful" else hasty_steps(problem.expression)
        number = steps[-1][-1]
        work = STEPS[language].format(*map(step_text, steps))
    if style == "think":
        return f"<think>{work}</think> <answer>{number}</answer>", number
    lead = work and work + STEP_ENDS[language]
    if style == "sentence":
        return lead + SENTENCES[language].format(number), number
    return lead + (f"= {number}" if style == "equals" else f"\\boxed{{{number}}}"), number


def step_text(step: Step) -> str:
    left, operator, right, result = step
    return f"{left} {operator} {right} = {result}"


def context(problem: Problem, kind: str) -> str:
    """The text before the response."""
    if kind == "template":
        return fill_template(problem.question)
    return DIALOGUES[problem.language].format(problem.question) if kind == "dialogue" else problem.question + "\n"


def worked_documents(config: DataConfig) -> Iterator[Document]:
    """The `config.num_documents` documents of `config.seed`, with what they were made from."""
    rng = random.Random(f"documents {config.seed}")
    for _ in range(config.num_documents):
        problem = draw_problem(rng, config)
        quality, style, kind = QUALITIES.draw(rng), STYLES.draw(rng), CONTEXTS.draw(rng)
        other = rng.random() < OTHER_LANGUAGE_SHARE
        language = LANGUAGES[(problem.language == "zh") != other]
        response, number = write_response(problem, quality, style, language, rng)
        yield Document(context(problem, kind), response, problem.expression, number, quality, style)


def documents(config: DataConfig) -> Iterator[str]:
    """The texts to pre-train on, without begin and end tokens."""
    for document in worked_documents(config):
        yield document.prompt + document.response
