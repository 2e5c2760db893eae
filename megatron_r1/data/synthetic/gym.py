"""Two tasks of reasoning-gym, narrowed to the expressions of the arithmetic world.

The library writes the questions, knows the answers and scores them; this file only selects items: three numbers from
0 to 9, every step within 0..99, no brackets, and an answer that our own evaluation confirms. That check is needed:
with `allow_parentheses=False`, `basic_arithmetic` evaluates left to right and answers 2 + 3 * 4 with 20. So items are
generated with brackets allowed, which the library evaluates properly, and those with brackets are skipped.
"""

from __future__ import annotations

import random
from functools import cache
from typing import TYPE_CHECKING

from megatron_r1.data.synthetic.arithmetic import Problem
from megatron_r1.data.synthetic.expressions import in_eval_split, normalise, value, world
from megatron_r1.errors import DataError

if TYPE_CHECKING:
    from reasoning_gym.dataset import ProceduralDataset

TASKS = ("chain_sum", "basic_arithmetic")
MOST_ATTEMPTS = 1_000_000


@cache
def dataset(task: str) -> ProceduralDataset:
    """The library's task; its item `i` depends on `i` alone."""
    # The library imports all of its tasks, and with them sympy and matplotlib: seconds, for runs that ask for an item.
    from reasoning_gym.arithmetic.basic_arithmetic import BasicArithmeticDataset, BasicArithmeticDatasetConfig
    from reasoning_gym.arithmetic.chain_sum import ChainSumConfig, ChainSumDataset

    if task == "chain_sum":
        return ChainSumDataset(ChainSumConfig(min_terms=3, max_terms=3, min_digits=1, max_digits=1, seed=0))
    if task == "basic_arithmetic":
        return BasicArithmeticDataset(
            BasicArithmeticDatasetConfig(
                min_terms=3,
                max_terms=3,
                min_digits=1,
                max_digits=1,
                operators=["+", "-", "*"],
                seed=0,
                format_style="natural",
            )
        )
    raise DataError(f"task={task}: must be one of {', '.join(TASKS)}")


def item(task: str, index: int) -> Problem | None:
    """Item `index` of the task; None where its expression is outside the world or its answer wrong."""
    entry = dataset(task)[index]
    expression = normalise(entry["metadata"]["expression"])
    if expression not in world() or str(value(expression)) != entry["answer"]:
        return None
    return Problem(expression, entry["question"], entry["answer"], "en", task)


def draw_item(rng: random.Random, eval_fraction: float, evaluation: bool) -> Problem:
    """A random item of a random task: of the evaluation split where `evaluation`, else of the training split.

    Raises:
        DataError: no such item was found.
    """
    task = rng.choice(TASKS)
    for _ in range(MOST_ATTEMPTS):
        problem = item(task, rng.randrange(2**40))
        if problem is not None and in_eval_split(problem.expression, eval_fraction) is evaluation:
            return problem
    raise DataError(f"eval_fraction={eval_fraction}: leaves no {task} item in the requested split")


def verify(task: str, answer: str, truth: str) -> bool:
    """Whether the library's own scorer gives `answer` full credit; partial credit counts as wrong."""
    return bool(dataset(task).score_answer(answer, {"answer": truth}) == 1.0)
