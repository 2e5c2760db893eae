"""Prompts for reinforcement learning, generated or of a file, and held-out prompts for evaluation.

Training prompts form an endless list that is addressed by index, so a run that resumes at prompt n needs no replay.
The generated list contains no held-out expression, and no two evaluation prompts share an expression.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

from megatron_r1.config.data import DataConfig
from megatron_r1.config.reward import DOMAINS
from megatron_r1.data.synthetic.arithmetic import FAMILY_FORMS, Problem, draw_expression, family_problem
from megatron_r1.data.synthetic.assistant.texts import SyntheticPrompt, synthetic_prompts
from megatron_r1.data.synthetic.expressions import eval_expressions
from megatron_r1.data.synthetic.gym import draw_item
from megatron_r1.errors import DataError

REASONING, HELPFULNESS, HARMLESSNESS = DOMAINS
SAFETY_TASKS = ("make",)
"""Tasks of the assistant world whose requests may be harmful."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question; `data.chat.prompt_format` makes the text that a model reads."""

    id: str
    """train-INDEX or heldout-INDEX."""
    question: str
    answer: str
    """The true answer."""
    expression: str
    """The arithmetic expression that the question is about; empty where there is none."""
    task: str
    """family, chain_sum, basic_arithmetic, or a task of the assistant world, which has many good answers."""
    response: str = ""
    """A response that the prompt shows, to be rewritten or summed up; empty where it shows none."""
    domain: str = REASONING
    """One of `config.reward.DOMAINS`: which rewards score responses."""


class TrainingPrompts:
    """The endless list of training prompts of a config."""

    def __init__(self, config: DataConfig):
        self.config = config

    def at(self, index: int) -> Prompt:
        """Prompt `index`; the same prompt at every call."""
        config = self.config
        rng = random.Random(f"prompt {config.seed} {index}")
        if config.source == "assistant" and rng.random() >= config.arithmetic_share:
            return assistant_prompt(next(synthetic_prompts(config, 1, start=index)), f"train-{index}")
        if rng.random() < config.reasoning_gym_share:
            problem = draw_item(rng, config.eval_fraction, evaluation=False)
        else:
            problem = family_problem(draw_expression(rng, FAMILY_FORMS.draw(rng), config), rng, config)
        return as_prompt(problem, f"train-{index}")


class FilePrompts:
    """The prompts of a file as an endless list: every epoch has all of them, in a random order of its own."""

    def __init__(self, prompts: Sequence[Prompt], seed: int):
        """
        Args:
            seed: of the orders.
        """
        self._prompts, self._seed = tuple(prompts), seed
        self._order = lru_cache(4)(self._draw)

    def at(self, index: int) -> Prompt:
        """Prompt `index`; the same prompt at every call."""
        epoch, index = divmod(index, len(self._prompts))
        return self._prompts[self._order(epoch)[index]]

    def _draw(self, epoch: int) -> list[int]:
        order = list(range(len(self._prompts)))
        random.Random(f"prompt file {self._seed} {epoch}").shuffle(order)
        return order


def eval_prompts(config: DataConfig, count: int) -> list[Prompt]:
    """The first `count` held-out problems as prompts; raises as `eval_problems`."""
    problems = eval_problems(config, count)
    return [as_prompt(problem, f"heldout-{index}") for index, problem in enumerate(problems)]


def eval_problems(config: DataConfig, count: int) -> list[Problem]:
    """The first `count` held-out problems, no two with the same expression; a longer list begins with the shorter.

    They do not depend on `config.seed`, so runs with different seeds are measured on the same problems.

    Raises:
        DataError: the split does not hold that many.
    """
    rng = random.Random("heldout prompts")
    pool = list(eval_expressions(config.eval_fraction))
    drawn: set[str] = set()
    problems: list[Problem] = []
    for _ in range(count):
        if rng.random() < config.reasoning_gym_share:
            problem = draw_new_eval_problem(rng, config.eval_fraction, drawn)
        else:
            while pool and pool[0] in drawn:
                pool.pop(0)
            if not pool:
                raise DataError(f"prompts={count}: eval_fraction={config.eval_fraction} holds out only {len(problems)}")
            problem = family_problem(pool.pop(0), rng, config)
        drawn.add(problem.expression)
        problems.append(problem)
    return problems


def eval_assistant_prompts(config: DataConfig, count: int) -> list[Prompt]:
    """The first `count` held-out questions of the assistant world; `hidden_rules` scores the responses to them.

    Raises:
        DataError: the split does not hold that many.
    """
    generated = synthetic_prompts(config, count, evaluation=True)
    return [assistant_prompt(each, f"heldout-assistant-{index}") for index, each in enumerate(generated)]


def assistant_prompt(generated: SyntheticPrompt, id: str) -> Prompt:
    domain = HARMLESSNESS if generated.task in SAFETY_TASKS else HELPFULNESS
    return Prompt(id, generated.question, generated.answer, generated.question, generated.task, domain=domain)


def draw_new_eval_problem(rng: random.Random, eval_fraction: float, drawn: set[str]) -> Problem:
    """A held-out reasoning-gym problem whose expression is not among `drawn`, those of earlier problems."""
    for _ in range(1000):
        problem = draw_item(rng, eval_fraction, evaluation=True)
        if problem.expression not in drawn:
            return problem
    raise DataError(f"eval_fraction={eval_fraction}: holds out only {len(drawn)} expressions")


def as_prompt(problem: Problem, id: str) -> Prompt:
    return Prompt(id, problem.question, problem.answer, problem.expression, problem.task)


class Prompts(Protocol):
    """An endless list of questions."""

    def at(self, index: int) -> Prompt:
        """Prompt `index`; the same prompt at every call."""
        ...
