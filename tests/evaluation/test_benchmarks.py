"""Benchmarks: held-out prompts, and metrics that distinguish good responses from bad ones."""

from __future__ import annotations

import re

import pytest

from megatron_r1.config.data import DataConfig
from megatron_r1.config.reward import RewardConfig
from megatron_r1.data.synthetic.assistant.tasks import TASKS
from megatron_r1.data.synthetic.expressions import in_eval_split
from megatron_r1.evaluation.benchmarks import BENCHMARKS

CONFIG = DataConfig()


def marks(questions: str, answer_of, count: int = 100) -> dict[str, float]:
    """Mean of each metric over responses to held-out prompts."""
    benchmark = BENCHMARKS[questions]
    prompts = benchmark.prompts(CONFIG, count)
    with benchmark.measures(RewardConfig()) as measures:
        return {
            name: sum(metric(prompts, [*map(answer_of, prompts)])) / count for name, metric in measures.metrics.items()
        }


def tagged(thought: str, answer: str) -> str:
    return f"<think>{thought}</think> <answer>{answer}</answer>"


def share_of_english_questions() -> float:
    questions = [prompt.question for prompt in BENCHMARKS["arithmetic"].prompts(CONFIG, 100)]
    return sum(not re.search("[\u4e00-\u9fff]", question) for question in questions) / 100


def test_arithmetic_distinguishes_correct_tagged_and_well_formed():
    def found(respond):
        return [*marks("arithmetic", respond).items()]

    names = ("correct_any_format", "correct_tagged", "format", "language")
    english = share_of_english_questions()
    assert found(lambda p: tagged("so it is", p.answer)) == [*zip(names, (1.0, 1.0, 1.0, english), strict=True)]
    assert found(lambda p: f"{p.answer}.") == [*zip(names, (1.0, 0.0, 0.0, 0.0), strict=True)]
    assert found(lambda p: tagged("\u7b54\u6848 is it", "-1")) == [*zip(names, (0.0, 0.0, 1.0, 0.5), strict=True)]
    assert all(in_eval_split(p.expression, CONFIG.eval_fraction) for p in BENCHMARKS["arithmetic"].prompts(CONFIG, 50))


def test_general_tasks_distinguish_helpful_and_safe():
    assert marks("assistant", lambda p: tagged("x", p.answer)) == {"helpful": 1.0, "safe": 1.0, "format": 1.0}
    assert marks("assistant", lambda p: "nothing") == {"helpful": 0.0, "safe": 1.0, "format": 0.0}
    # Harmful requests are declined, and yet the reasoning went about them.
    planned = marks("assistant", lambda p: tagged("I will mix it.", p.answer))
    assert planned["helpful"] == 1.0 and 0.0 < 1 - planned["safe"] < 0.5
    assert {p.task for p in BENCHMARKS["assistant"].prompts(CONFIG, 100)} == set(TASKS)


@pytest.mark.parametrize("questions", BENCHMARKS)
def test_a_longer_benchmark_begins_with_the_shorter_and_seeds_do_not_matter(questions):
    prompts = BENCHMARKS[questions].prompts
    assert prompts(CONFIG, 40)[:15] == prompts(DataConfig(seed=3), 15)
