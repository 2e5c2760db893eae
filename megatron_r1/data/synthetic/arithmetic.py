"""The arithmetic world as text: problems in English and Chinese, and documents that solve them well or badly.

A document is one question and one response, as on the web: in several wordings and answer formats, in qualities from
careful to guessed, in the question's language, in the other one, or in both. Quality, format and language are drawn
independently, so that only the reward tells a model which to prefer. A model that imitates the text perfectly can solve
the problems, but mostly answers wrong, and often in two languages.

Some documents show what a model is later prompted with: a worked example before the question (few-shot), a request to
verify the result, and a request to rewrite a response in one language.

No document contains a held-out expression. The same config gives the same documents on every machine.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
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

FAMILY = "family"
"""Task of the world's own questions; the others are of reasoning-gym."""
CHINESE_SHARE = 0.4
LANGUAGE_SHARES = {"own": 0.70, "other": 0.08, "mixed": 0.22}
"""Language of a response: the question's, the other one, or a change from one to the other between two steps."""
LARGEST_GUESS_ERROR = 8

QUALITY_SHARES = {"careful": 0.30, "hasty": 0.25, "guess": 0.45}
"""careful honours precedence; hasty takes the wrong order; guess shows no step and names a number near the truth."""

CONTEXT_SHARES = {"template": 0.45, "dialogue": 0.30, "plain": 0.25}
"""The text before the response: the R1-Zero template, a short `Q: ... A: `, or the bare question and a line break."""

KIND_SHARES = {"answer": 0.82, "few_shot": 0.08, "verified": 0.05, "rewritten": 0.05}
"""What a document shows: an answer; a worked example and an answer in its manner; an answer with a check of its result,
as the question requests; or an answer, and the same one rewritten in one language."""

FORMAT_SHARES = {"think": 0.35, "sentence": 0.30, "equals": 0.20, "boxed": 0.15}
"""How the answer is given; only the first has reasoning and answer inside tags."""

QUESTIONS = {
    "en": ("What is {}?", "Calculate {}.", "Compute {}.", "Solve {}.", "Evaluate: {}."),
    "zh": ("{}等于多少？", "计算{}。", "求{}的值。"),
}
CHAIN_SUM_QUESTION = "State the final answer to the following arithmetic problem: {} ="
SENTENCES = {"en": "The answer is {}.", "zh": "答案是{}。"}
GUESSES = {"en": "I guess {}.", "zh": "大概是{}。"}
STEPS = {"en": ("first {}", ", then {}"), "zh": ("先算{}", "，再算{}")}
STEP_ENDS = {"en": ". ", "zh": "。"}
DIALOGUES = {"en": "Q: {}\nA: ", "zh": "问：{}\n答："}
LANGUAGES = ("en", "zh")
VERIFY = "Solve step by step and verify: {}"
CHECKS = {"en": ". Check: {}", "zh": "。验算：{}"}
FEW_SHOT = "Q: {}\nA:{}\nQ: {}\nA:"
REWRITE = "{}\n{}\nRewrite in the language of the question:"
"""Texts of the prompt styles tiny_direct, tiny_few_shot and tiny_rewrite in configs/prompt_style, with which a model of
this world is prompted."""
PIECES = r"A:(?! )|Solve step by step and verify: |\\boxed\{|The answer is |答案是|(?<=\. )= |(?<=。)= "
"""Where a tokenizer cuts this world's text, as a regular expression: around each request, and before an answer."""
SUMS = ("++", "+-", "-+", "--")
OPERATOR_PAIRS = tuple(a + b for a in "+-*" for b in "+-*")


class Manner(NamedTuple):
    """How a response is written."""

    quality: str
    style: str
    language: str
    """own, other or mixed; see LANGUAGE_SHARES."""


class Document(NamedTuple):
    """One document of pre-training text, `prompt + response`, and what it was made from."""

    prompt: str
    response: str
    expression: str
    answer: int
    """The number that the document gives, right or wrong."""
    quality: str
    style: str
    language: str
    kind: str
    """answer, few_shot, verified or rewritten."""


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
LANGUAGE_CHOICES, DOCUMENT_KINDS = Shares(LANGUAGE_SHARES), Shares(KIND_SHARES)


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
    return Problem(expression, question, str(value(expression)), language, FAMILY)


def write_response(
    problem: Problem, quality: str, style: str, language: str, rng: random.Random, ending: str = "", check: bool = False
) -> tuple[str, int]:
    """A response of the given quality, format and language, and the number that it gives.

    Args:
        ending: language from the second step on; empty stays in the first one.
        check: whether the last step is checked by its inverse.
    """
    truth, ending = int(problem.answer), ending or language
    if quality == "guess":
        number = max(0, truth + rng.randint(-LARGEST_GUESS_ERROR, LARGEST_GUESS_ERROR))
        work = GUESSES[language].format(number) if style == "think" else ""
    else:
        steps = careful_steps(problem.expression) if quality == "careful" else hasty_steps(problem.expression)
        number = steps[-1][-1]
        work = STEPS[language][0].format(step_text(steps[0])) + STEPS[ending][1].format(step_text(steps[1]))
        if check:
            work += CHECKS[ending].format(step_text(inverse(steps[1])))
    if style == "think":
        return f"<think>{work}</think> <answer>{number}</answer>", number
    lead = work and work + STEP_ENDS[ending]
    if style == "sentence":
        return lead + SENTENCES[ending].format(number), number
    return lead + (f"= {number}" if style == "equals" else f"\\boxed{{{number}}}"), number


def inverse(step: Step) -> Step:
    """The step that undoes a sum or difference; a product with its factors exchanged."""
    left, operator, right, result = step
    return (right, "*", left, result) if operator == "*" else (result, "-+"[operator == "-"], right, left)


def step_text(step: Step) -> str:
    left, operator, right, result = step
    return f"{left} {operator} {right} = {result}"


def context(problem: Problem, kind: str) -> str:
    """The text before the response."""
    if kind == "template":
        return fill_template(problem.question)
    return DIALOGUES[problem.language].format(problem.question) if kind == "dialogue" else problem.question + "\n"


def draw_manner(rng: random.Random) -> Manner:
    return Manner(QUALITIES.draw(rng), STYLES.draw(rng), LANGUAGE_CHOICES.draw(rng))


def respond(problem: Problem, manner: Manner, rng: random.Random, check: bool = False) -> tuple[str, int]:
    """A response in this manner, and the number that it gives."""
    own = problem.language
    other = "en" if own == "zh" else "zh"
    first, then = {"own": (own, own), "other": (other, other), "mixed": rng.choice([(own, other), (other, own)])}[
        manner.language
    ]
    return write_response(problem, manner.quality, manner.style, first, rng, then, check)


def answered(rng: random.Random, config: DataConfig) -> Document:
    """A question and a response to it."""
    problem, manner = draw_problem(rng, config), draw_manner(rng)
    prompt = context(problem, CONTEXTS.draw(rng))
    response, number = respond(problem, manner, rng)
    return Document(prompt, response, problem.expression, number, *manner, "answer")


def few_shot(rng: random.Random, config: DataConfig) -> Document:
    """A worked example, a question, and a response in the example's manner."""
    example, problem, manner = draw_problem(rng, config), draw_problem(rng, config), draw_manner(rng)
    shown, _ = respond(example, manner, rng)
    response, number = respond(problem, manner, rng)
    prompt = FEW_SHOT.format(example.question, shown, problem.question)
    return Document(prompt, response, problem.expression, number, *manner, "few_shot")


def verified(rng: random.Random, config: DataConfig) -> Document:
    """A question that requests a check of the result, and a response with one."""
    problem, manner = draw_problem(rng, config), draw_manner(rng)
    request = replace(problem, question=VERIFY.format(problem.question))
    manner = manner._replace(quality="careful" if manner.quality == "guess" else manner.quality)
    response, number = respond(problem, manner, rng, check=True)
    return Document(context(request, CONTEXTS.draw(rng)), response, problem.expression, number, *manner, "verified")


def rewritten(rng: random.Random, config: DataConfig) -> Document:
    """A question with a response, and the same response in the question's language and inside tags."""
    problem, manner = draw_problem(rng, config), draw_manner(rng)
    state = rng.getstate()
    draft, _ = respond(problem, manner, rng)
    rng.setstate(state)
    manner = Manner(manner.quality, "think", "own")
    response, number = respond(problem, manner, rng)
    prompt = REWRITE.format(problem.question, draft)
    return Document(prompt, response, problem.expression, number, *manner, "rewritten")


WRITERS: dict[str, Callable[[random.Random, DataConfig], Document]] = {
    "answer": answered,
    "few_shot": few_shot,
    "verified": verified,
    "rewritten": rewritten,
}


def worked_documents(config: DataConfig) -> Iterator[Document]:
    """The `config.num_documents` documents of `config.seed`, with what they were made from."""
    rng = random.Random(f"documents {config.seed}")
    for _ in range(config.num_documents):
        yield WRITERS[DOCUMENT_KINDS.draw(rng)](rng, config)


def documents(config: DataConfig) -> Iterator[str]:
    """The texts to pre-train on, without begin and end tokens."""
    for document in worked_documents(config):
        yield document.prompt + document.response
