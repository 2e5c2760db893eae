"""reasoning-gym's own verifiers, for tasks `reasoning_gym:NAME`; the truth is the library's entry as JSON.

The verifiers run in worker processes with a deadline. Some of them evaluate the answer as Python, so
that an answer could run any code: tasks with such a verifier are refused before any answer is read.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from importlib import import_module
from typing import Any

from megatron_r1.config.reward import MathConfig
from megatron_r1.errors import DataError
from megatron_r1.rewards.normalise import unwrapped
from megatron_r1.rewards.reward import Unscored
from megatron_r1.rewards.workers import WorkerPool, WorkersDown

PREFIX = "reasoning_gym:"
EVALUATES = re.compile(r"\b(?:eval|exec|parse_expr|sympify|parse_latex|__import__)\s*\(|\b(?:pickle|subprocess)\b")


@cache
def check_task(name: str) -> None:
    """Raises DataError: the library has no such task, or its verifier would run what a model wrote."""
    from reasoning_gym.factory import DATASETS

    if name not in DATASETS:
        raise DataError(f"task={PREFIX}{name}: reasoning-gym has no task of this name")
    kinds = [kind for kind in DATASETS[name][0].__mro__ if kind.__module__.startswith("reasoning_gym.")]
    if any(EVALUATES.search(inspect.getsource(inspect.getmodule(kind) or kind)) for kind in kinds):
        raise DataError(f"task={PREFIX}{name}: its verifier evaluates answers as Python, which is never done here")


@cache
def _scorer(task: str) -> Any:
    import reasoning_gym

    return reasoning_gym.get_score_answer_fn(task)


def full_marks(answer: str, task: str, entry: str) -> bool:
    """Whether the task's own verifier gives them; a worker asks it."""
    return bool(_scorer(task)(answer, json.loads(entry)) == 1.0)


class GymVerifier:
    """Verifies answers to reasoning-gym's tasks; its workers start with the first answer."""

    def __init__(self, config: MathConfig):
        self._config = config
        warm_up = partial(import_module, "reasoning_gym")
        self.pool = WorkerPool(full_marks, warm_up, config.workers, config.timeout_s)

    def is_correct(self, answer: str | None, task: str, truth: str) -> bool | Unscored:
        """Whether the library's verifier gives full credit; partial credit counts as wrong.

        Raises:
            DataError: the task does not exist, or its verifier would run what a model wrote.
        """
        name = task.removeprefix(PREFIX)
        check_task(name)
        if answer is None or len(answer) > self._config.max_characters:
            return False
        try:
            return self.pool.ask(answer, name, truth) or (
                (plain := unwrapped(answer)) != answer and self.pool.ask(plain, name, truth)
            )
        except WorkersDown as error:
            return Unscored(f"reasoning-gym workers: {error}")

    def verdicts(
        self, answers: Sequence[str | None], tasks: Sequence[str], truths: Sequence[str]
    ) -> list[bool | Unscored]:
        """Verdicts on many answers, in order; as many are verified at a time as there are workers."""
        with ThreadPoolExecutor(self._config.workers, "gym") as threads:
            return list(threads.map(self.is_correct, answers, tasks, truths))

    def truth_problems(self, tasks: Sequence[str], truths: Sequence[str]) -> list[str]:
        """For each prompt why no answer could be correct: no such task, no entry, or one whose own answer is wrong."""
        return [self._truth_problem(task, truth) for task, truth in zip(tasks, truths, strict=True)]

    def _truth_problem(self, task: str, truth: str) -> str:
        try:
            check_task(task.removeprefix(PREFIX))
            entry = json.loads(truth)
            answer = entry["answer"]
        except DataError as error:
            return str(error)
        except (ValueError, TypeError, KeyError):
            return f"the true answer of a prompt of task={task} must be the library's entry as JSON, with its answer"
        if not isinstance(answer, str):  # tasks with many solutions have none of their own
            return ""
        return (
            ""
            if self.is_correct(answer, task, truth) is True
            else f"task={task} does not accept the entry's own answer"
        )

    def close(self) -> None:
        self.pool.close()
