"""Two tasks of reasoning-gym, narrowed to the expressions of the arithmetic world.

The library writes the questions, knows the answers and scores them; this file only chooses which of its items to
take: three numbers from 0 to 9, every step within 0..99, no brackets, and the truth by our own evaluation. The last
is no formality: `basic_arithmetic` without brackets works left to right and calls 2 + 3 * 4 twenty, so it is asked
for items with brackets allowed, which it evaluates properly, and those that have none are kept.
"""

from __future__ import annotations

import random
from functools import cache

from reasoning_gym.arithmetic.basic_arithmetic import BasicArithmeticDataset, BasicArithmeticDatasetConfig
from reasoning_gym.arithmetic.chain_sum import ChainSumConfig, ChainSumDataset
from reasoning_gym.dataset import ProceduralDataset

from megatron_r1.data.synthetic.arithmetic import Problem
from megatron_r1.data.synthetic.expressions import is_heldout, normalise, value, world
from megatron_r1.errors import DataError

TASKS = ("chain_sum", "basic_arithmetic")
MOST_ATTEMPTS = 1_000_000


@cache
def dataset(task: str) -> ProceduralDataset:
    """The library's task; its item `i` depends on `i` alone."""
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
    """Item `index` of the task, or nothing where it falls outside the world."""
    entry = dataset(task)[index]
    expression = normalise(entry["metadata"]["expression"])
    if expression not in world() or str(value(expression)) != entry["answer"]:
        return None
    return Problem(expression, entry["question"], entry["answer"], "en", task)


def draw_item(rng: random.Random, heldout_fraction: float, heldout: bool) -> Problem:
    """A random item of a random task from one side of the held-out split.

    Raises:
        DataError: no such item was found.
    """
    task = rng.choice(TASKS)
    for _ in range(MOST_ATTEMPTS):
        problem = item(task, rng.randrange(2**40))
        if problem is not None and is_heldout(problem.expression, heldout_fraction) is heldout:
            return problem
    raise DataError(f"eval_fraction={heldout_fraction}: leaves no {task} item on the wanted side")


def verify(task: str, answer: str, truth: str) -> bool:
    """Whether the library's own scorer calls `answer` right in full; partial credit counts as wrong."""
    return bool(dataset(task).score_answer(answer, {"answer": truth}) == 1.0)
